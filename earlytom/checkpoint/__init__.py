"""Files on disk to models: LLaVA-NeXT's format, transformers' format, and the built-in demo.

Names are imported when they are first used: an identity or a configuration does not cost torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

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
    from .demo import write_demo
    from .formats import live_config
    from .identity import CheckpointIdentity
    from .loader import Model, best_attention, load
    from .modules import SharedParts, share_weights

__getattr__ = lazy_names(__name__, _HOMES)
