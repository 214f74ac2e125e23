"""EarlyTom for deployment: visual tokens of video LLMs merged and selected inside the vision tower, in static shapes.

    import earlytom
    model = earlytom.load("demo")
    tower = earlytom.StaticTower(model.vision, earlytom.preset("videomme", 0.2))
    tokens = tower(frames).tokens                       # frames uint8 [1, 32, 384, 384, 3]
    ids = earlytom.generate(model, prompt_ids, tokens[0], max_new_tokens=32)

or, on a model that is loaded already: `from earlytom import earlytom; model = earlytom(model, retain=0.2)`.
Names are imported when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveTower": "adaptive",
    "EarlyTomConfig": "config",
    "InnerMerging": "config",
    "Model": "checkpoint",
    "StaticTower": "tower",
    "TowerOutputs": "tower",
    "VideoPipeline": "pipeline",
    "VisionGeometry": "vision.geometry",
    "earlytom": "wrap",
    "encode_video": "reference",
    "generate": "language.qwen2",
    "load": "checkpoint",
    "preset": "presets",
    "read_frames": "video",
    "restore": "wrap",
}
__all__ = ["__version__"]
__all__ += list(_HOMES)

if TYPE_CHECKING:
    from .adaptive import AdaptiveTower as AdaptiveTower
    from .checkpoint import Model as Model
    from .checkpoint import load as load
    from .config import EarlyTomConfig as EarlyTomConfig
    from .config import InnerMerging as InnerMerging
    from .language.qwen2 import generate as generate
    from .pipeline import VideoPipeline as VideoPipeline
    from .presets import preset as preset
    from .reference import encode_video as encode_video
    from .tower import StaticTower as StaticTower
    from .tower import TowerOutputs as TowerOutputs
    from .video import read_frames as read_frames
    from .vision.geometry import VisionGeometry as VisionGeometry
    from .wrap import earlytom as earlytom
    from .wrap import restore as restore


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
