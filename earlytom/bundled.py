"""A bundle's engine in place of a live model's tower, for `earlytom(model, bundle=...)`."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .checkpoint.formats import CheckpointConfig
from .config import EarlyTomConfig
from .errors import ConfigError, EngineError, InputError
from .shapes import derive_shapes
from .tower import TowerOutputs, split_videos
from .vision.geometry import VisionGeometry

OPENERS = "earlytom.bundles"  # entry points: (path, engine) -> Engine
CLOSE = 0.3  # how far from a whole number of 0..255 a pixel may be, which bfloat16 rounds by up to 0.25
SAME = 1e-2  # relative: a newline in 16 bits is the same newline


class Engine(Protocol):
    """An engine of a bundle, as an opener gives it."""

    config: EarlyTomConfig
    geometry: VisionGeometry

    def run(self, frames: Tensor) -> TowerOutputs: ...

    def close(self) -> None: ...


class BundleEncoder:
    """Encodes a live model's videos with the engine of a bundle. Copies of it share the engine.

    Raises ConfigError when the bundle is of another tower than the model's, EngineError when nothing opens it, and what
    the opener raises.
    """

    def __init__(self, path: str | Path, engine: str, live: CheckpointConfig) -> None:
        found = list(entry_points(group=OPENERS))
        if not found:
            raise EngineError(f"nothing here opens bundles: install earlytom-export, which opens {path}")
        self.path, self.engine = path, found[0].load()(path, engine)
        self.config: EarlyTomConfig = self.engine.config
        self.checked = False
        wrong = [
            f"{name} {mine}, the model {own}"
            for name, mine, own in (
                ("geometry", self.engine.geometry, live.geometry),
                ("pooling", self.config.pooling, live.pooling),
                ("newline", self.config.newline, live.newline),
            )
            if mine != own
        ]
        if wrong:
            self.close()
            raise ConfigError(f"the bundle {path} is of another tower than the model's: it has {'; '.join(wrong)}")
        self.side = derive_shapes(self.config, self.engine.geometry).pooled_grid

    def __deepcopy__(self, memo: dict[int, Any]) -> BundleEncoder:
        return self

    def close(self) -> None:
        """Free what the engine holds."""
        self.engine.close()

    def encode(self, pixels: Tensor, newline: Tensor) -> Tensor:
        """Normalised pixels [T, 3, H, W] of one video -> its visual tokens [N, L]; newline [L]: the model's.

        Raises InputError on pixels that no frames of 8 bits give, on another number of frames, and at the first video
        where the newline among the tokens is not the model's: then the bundle was exported from other weights.
        """
        frames = to_frames(pixels)
        if len(frames) != self.config.frames:
            raise InputError(
                f"a video has {len(frames)} frames and the bundle {self.path} takes {self.config.frames}: pass as many"
            )
        (video,) = split_videos(self.engine.run(frames[None]), self.config, self.side)
        if not self.checked and self.config.newline != "no_token":
            own = newline.detach().float().to(video.tokens.device)
            nearest = (video.tokens.float() - own).norm(dim=-1).min()
            if not nearest <= SAME * own.norm():
                raise InputError(f"the bundle {self.path} was exported from other weights than the model's")
        self.checked = True
        return video.tokens


def to_frames(pixels: Tensor) -> Tensor:
    """Normalised pixels [T, 3, H, W] -> the frames uint8 [T, H, W, 3] that they were made of. Raises InputError.

    SigLIP's normalisation has mean and deviation 0.5 for every colour.
    """
    if pixels.dim() != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise InputError(f"pixels are {pixels.dtype} {list(pixels.shape)}, an engine takes floating point [T, 3, H, W]")
    values = (pixels.float() + 1) * 127.5
    whole = values.round()
    if not bool(((values - whole).abs() <= CLOSE).all() & (whole >= 0).all() & (whole <= 255).all()):
        raise InputError(
            "pixels are no frames of 8 bits less 0.5 and divided by 0.5, which is what an engine takes: preprocess the "
            "video with the model's own image processor"
        )
    return whole.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
