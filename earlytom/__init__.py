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

from typing import TYPE_CHECKING

from .lazy import lazy_names

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
    from .adaptive import AdaptiveTower
    from .checkpoint import Model, load
    from .config import EarlyTomConfig, InnerMerging
    from .language.qwen2 import generate
    from .pipeline import VideoPipeline
    from .presets import preset
    from .reference import encode_video
    from .tower import StaticTower, TowerOutputs
    from .video import read_frames
    from .vision.geometry import VisionGeometry
    from .wrap import earlytom, restore

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
