"""Make a bundle: tower to ONNX, rules, verification, report.

    from export import ExportOptions, export
    bundle = export(ExportOptions(checkpoint="demo", retain=0.2, output="bundles/demo"))

Names are imported when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {"EngineOptions": "settings", "ExportOptions": "settings", "add_engine": "run", "export": "run"}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from .run import add_engine as add_engine
    from .run import export as export
    from .settings import EngineOptions as EngineOptions
    from .settings import ExportOptions as ExportOptions


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
