"""Verifying a bundle: the parity ladder over its backends."""

from earlytom.parity import HopReport, ParityReport

from .ladder import verify_bundle

__all__ = ["HopReport", "ParityReport", "verify_bundle"]
