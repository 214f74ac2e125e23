"""Run a bundle: ONNX Runtime, TensorRT, TensorRT for RTX, PyTorch.

    import engines
    with engines.open_pipeline("bundles/demo-r0.2") as pipeline:
        print(pipeline.ask("clip.mp4", "What happens in this video?").text)

Names are imported when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from earlytom.lazy import lazy_names

_HOMES = {"open_pipeline": "opening", "open_runner": "opening", "read_bundle": "bundle.reader"}
__all__ = ["open_pipeline", "open_runner", "read_bundle"]

if TYPE_CHECKING:
    from .bundle.reader import read_bundle
    from .opening import open_pipeline, open_runner

__getattr__ = lazy_names(__name__, _HOMES)
