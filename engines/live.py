"""The engine of a bundle as `earlytom(model, bundle=...)` takes it; earlytom finds it by the entry point."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from earlytom.config import EarlyTomConfig
from earlytom.errors import ConfigError
from earlytom.tower import TowerOutputs
from earlytom.vision.geometry import VisionGeometry

from .bundle.reader import read_bundle
from .opening import open_runner
from .runner import Runner


@dataclass(frozen=True)
class BundleTower:
    """An engine, opened, and what the bundle says of it."""

    runner: Runner
    config: EarlyTomConfig
    geometry: VisionGeometry

    def run(self, frames: Tensor) -> TowerOutputs:
        """Frames uint8 [1, T, H, W, 3] -> TowerOutputs. Raises InputError."""
        return self.runner.run(frames)

    def close(self) -> None:
        """Free what the engine holds."""
        self.runner.close()


def open_tower(bundle: Path | str, engine: str = "auto") -> BundleTower:
    """Open the bundle with an engine, see `open_runner`. Raises BundleError, ConfigError and EngineError."""
    found = read_bundle(bundle)
    manifest = found.manifest
    if manifest.batch != 1:
        raise ConfigError(
            f"the bundle {found.path} takes {manifest.batch} videos a call, a model encodes them one by one: export it "
            "with --batch 1"
        )
    return BundleTower(open_runner(found, engine), manifest.config, manifest.geometry)
