"""Every static size of the tower, derived in one place from a configuration and a vision geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError
from .vision.geometry import VisionGeometry, pooled_grid

if TYPE_CHECKING:
    from .config import EarlyTomConfig


def window_sizes(patches: int, windows: int) -> list[int]:
    """Sizes of `windows` contiguous windows over `patches`; the first `patches mod windows` are one patch longer."""
    base, longer = divmod(patches, windows)
    return [base + 1] * longer + [base] * (windows - longer)


@dataclass(frozen=True)
class StaticShapes:
    """All sizes of one static tower.

    batch: videos per call, V; frames: T; stage_frames: frames that enter the first layer, then what each merge layer
    leaves; final_frames: B; keep: patches kept in every frame, n = dominant + contextual; newlines: the most newline
    tokens that the output can hold; tokens: length of the output's token axis.
    """

    batch: int
    frames: int
    image_size: int
    patches: int
    pooled_grid: int
    pooled_patches: int
    stage_frames: tuple[int, ...]
    final_frames: int
    keep: int
    dominant: int
    contextual: int
    newlines: int
    hidden_size: int
    projector_size: int

    @property
    def visual_tokens(self) -> int:
        """Patches that reach the LLM, newlines not counted: B * n."""
        return self.final_frames * self.keep

    @property
    def tokens(self) -> int:
        return self.visual_tokens + self.newlines

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the tower takes."""
        return {"frames": ("uint8", (self.batch, self.frames, self.image_size, self.image_size, 3))}

    def outputs(self, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the tower gives, `dtype` being that of its weights."""
        v, b = self.batch, self.final_frames
        return {
            "tokens": (dtype, (v, self.tokens, self.projector_size)),
            "positions": ("int64", (v, b, self.keep)),
            "dynamic": ("bool", (v, b)),
            "weights": ("float32", (v, b, self.frames)),
        }


def check_fit(config: EarlyTomConfig, geometry: VisionGeometry) -> int:
    """Patches per side of the pooled grid. Raises ConfigError when a merge layer does not exist or no patch is left."""
    if config.merge_layers and config.merge_layers[-1] >= geometry.layers:
        raise ConfigError(
            f"merge layer {config.merge_layers[-1]} does not exist: the tower has {geometry.layers} layers, "
            f"so merge layers must lie in 0..{geometry.layers - 1}"
        )
    side = pooled_grid(geometry.grid, config.pooling)
    if side == 0:
        raise ConfigError(f"{config.pooling} pooling leaves no patch of a {geometry.grid} x {geometry.grid} grid")
    return side


def derive_shapes(config: EarlyTomConfig, geometry: VisionGeometry, batch: int = 1) -> StaticShapes:
    """Sizes of the static tower for `config` on `geometry`: n = round(r*T*P/B) patches in every frame.

    Raises ConfigError when a merge layer does not exist or the patches do not fit.
    """
    if batch < 1:
        raise ConfigError(f"batch is {batch}, it must be at least 1 video")
    side = check_fit(config, geometry)
    pooled = side**2
    final = config.frame_budgets[-1] if config.frame_budgets else config.frames
    keep = round(config.retain * config.frames * pooled / final)
    if not 1 <= keep <= pooled:
        raise ConfigError(
            f"retain {config.retain} over {config.frames} frames asks for {keep} of {pooled} patches in each of "
            f"{final} frames; raise the last frame budget or lower retain"
            if keep > pooled
            else f"retain {config.retain} keeps no patch of {config.frames} frames of {pooled} patches in a budget of "
            f"{final} frames; the smallest retain that keeps one is {0.5 * final / (config.frames * pooled):.2g}"
        )
    dominant = round(keep * (1 - config.contextual))
    newlines = {"one_token": 1, "grid": final * min(side, keep), "no_token": 0}[config.newline]
    return StaticShapes(
        batch=batch,
        frames=config.frames,
        image_size=geometry.image_size,
        patches=geometry.patches,
        pooled_grid=side,
        pooled_patches=pooled,
        stage_frames=(config.frames, *config.frame_budgets),
        final_frames=final,
        keep=keep,
        dominant=dominant,
        contextual=keep - dominant,
        newlines=newlines,
        hidden_size=geometry.hidden_size,
        projector_size=geometry.projector_size,
    )
