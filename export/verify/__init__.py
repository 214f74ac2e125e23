"""Verifying a bundle: the parity ladder over its backends."""

from earlytom.parity import HopReport, ParityReport

from .ladder import run_traced, verify_bundle

__all__ = ["HopReport", "ParityReport", "run_traced", "verify_bundle"]
