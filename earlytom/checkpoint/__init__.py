"""Files on disk to models: LLaVA-NeXT's format, transformers' format, and the built-in demo.

Names are imported when they are first used: an identity or a configuration does not cost torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CheckpointIdentity": "identity",
    "Model": "loader",
    "SharedParts": "modules",
    "best_attention": "loader",
    "live_config": "formats",
    "load": "loader",
    "share_weights": "modules",
    "write_demo": "demo",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from .demo import write_demo as write_demo
    from .formats import live_config as live_config
    from .identity import CheckpointIdentity as CheckpointIdentity
    from .loader import Model as Model
    from .loader import best_attention as best_attention
    from .loader import load as load
    from .modules import SharedParts as SharedParts
    from .modules import share_weights as share_weights


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
