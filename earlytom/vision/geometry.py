"""Sizes of the SigLIP tower and projector, without torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError

QUERY_BLOCKS = 9  # in which the attention received is computed: 81 queries each of so400m's 729


@dataclass(frozen=True)
class VisionGeometry:
    """Sizes of the SigLIP tower and projector; the defaults are so400m-patch14-384 in LLaVA-OneVision-7B.

    `layers` counts the encoder layers that are *used*: LLaVA takes the output of the last but one layer of the
    checkpoint (26 of 27), without the final LayerNorm.
    """

    image_size: int = 384
    patch_size: int = 14
    hidden_size: int = 1152
    heads: int = 16
    intermediate_size: int = 4304
    layers: int = 26
    layer_norm_eps: float = 1e-6
    projector_size: int = 3584

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "layer_norm_eps" and value < 1:
                raise ConfigError(f"vision geometry: {name} is {value}, it must be at least 1")
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"vision geometry: a patch of {self.patch_size} pixels does not fit in an image of {self.image_size}"
            )
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"vision geometry: width {self.hidden_size} does not divide into {self.heads} heads evenly"
            )

    @property
    def grid(self) -> int:
        """Patches per side of a frame; pixels left over at the right and bottom edge are not read."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """S, patches of a frame before pooling."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pooled_grid(grid: int, pooling: str) -> int:
    """Patches per side after the 2 x 2 pooling: bilinear rounds up (27 -> 14), average and max round down (27 -> 13).

    Source: `get_2dPool` in LLaVA-NeXT's `llava_arch.py`.
    """
    return math.ceil(grid / 2) if pooling == "bilinear" else grid // 2
