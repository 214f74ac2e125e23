"""The static tower in PyTorch as an engine."""

from __future__ import annotations

import numpy as np
import torch

from earlytom.config import EarlyTomConfig
from earlytom.errors import EngineError
from earlytom.tower import StaticTower, TowerOutputs
from earlytom.vision.siglip import Vision

from .bundle.manifest import TensorSpec
from .bundle.reader import Bundle
from .runner import Closing, Frames, OpenOptions, Runner, check_inputs


class TorchRunner(Closing):
    """The PyTorch tower as an engine, on the device and in the dtype of `vision`. No state changes: thread-safe."""

    name = "torch"
    thread_safe = True

    def __init__(
        self, vision: Vision, config: EarlyTomConfig, *, batch: int = 1, attention: str = "fused", why: str = ""
    ) -> None:
        self._tower: StaticTower | None = StaticTower(vision, config, batch=batch, attention=attention)
        shapes, dtype = self._tower.shapes, str(vision.dtype).removeprefix("torch.")
        self.inputs = tuple(TensorSpec(name, *spec) for name, spec in shapes.inputs.items())
        self.outputs = tuple(TensorSpec(name, *spec) for name, spec in shapes.outputs(dtype).items())
        self.device = vision.image_newline.device
        self.why = why or f"torch, {dtype} on {self.device}"

    def run(self, frames: Frames) -> TowerOutputs:
        """As Runner.run; the outputs lie on the device of the weights."""
        check_inputs(self.inputs, {"frames": frames})
        if self._tower is None:
            raise EngineError("the torch engine was closed: open it again")
        if isinstance(frames, np.ndarray):
            frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
        with torch.no_grad():
            outputs: TowerOutputs = self._tower(frames.to(self.device))
            return outputs

    def close(self) -> None:
        self._tower = None


def probe(name: str) -> str:
    """See engines/runner.py."""
    return f"torch {torch.__version__}, {'CUDA' if torch.cuda.is_available() else 'CPU'}; needs the checkpoint"


def open_bundle(name: str, bundle: Bundle, options: OpenOptions) -> Runner:
    manifest, vision = bundle.manifest, options.vision
    if vision is None:
        raise EngineError(
            f"the torch engine needs the weights, which a bundle does not hold: give the checkpoint "
            f"{manifest.checkpoint['name']}"
        )
    if vision.geometry != manifest.geometry:
        raise EngineError(
            f"the weights given to the torch engine are not those of the bundle {bundle.path}: their sizes differ, "
            f"{vision.geometry} against {manifest.geometry}"
        )
    if options.device is not None:
        vision = vision.to(options.device)
    return TorchRunner(vision, manifest.config, batch=manifest.batch)
