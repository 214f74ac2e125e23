"""Make a bundle: tower to ONNX, rules, verification, report.

    from export import ExportOptions, export
    bundle = export(ExportOptions(checkpoint="demo", retain=0.2, output="bundles/demo"))

Names are imported when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from earlytom.lazy import lazy_names

_HOMES = {"EngineOptions": "settings", "ExportOptions": "settings", "add_engine": "run", "export": "run"}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from .run import add_engine, export
    from .settings import EngineOptions, ExportOptions

__getattr__ = lazy_names(__name__, _HOMES)
