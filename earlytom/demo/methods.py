"""The rows of an evaluation: the unpruned tower, EarlyTom's forms, and controls that keep as many patches blindly.

T frames, P pooled patches of a frame, L width of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..adaptive import AdaptiveTower
from ..calibration.budgets import DEFAULT_PERCENTILE, percentile_budgets
from ..calibration.merging import merge_clip
from ..config import EarlyTomConfig, InnerMerging
from ..errors import ConfigError
from ..presets import preset, published_inner
from ..shapes import derive_shapes
from ..tokens import grid_sequence
from ..tower import StaticTower, split_videos
from ..vision.geometry import pooled_grid
from ..vision.siglip import Vision, pool
from .evaluate import Row
from .remember import RememberingVision
from .report import CONTROLS, METHODS

PRESET = "videomme"


def make_rows(
    model: Any,
    *,
    methods: Sequence[str] = METHODS,
    retain: Sequence[float] = (0.25, 0.20, 0.15, 0.10),
    inner: str = "off",
    frames: int = 32,
    seed: int = 0,
    calibration: Iterable[Tensor] = (),
) -> list[Row]:
    """The rows of `methods` at each ratio, on the tower of `model`, with the settings published for VideoMME.

    inner: merging inside the LLM "off", "on" as published, or "both": then controls have none. calibration: clips uint8
    [T, H, W, 3] whose released frame counts give the budgets of "calibrated". Controls keep as many patches as
    "static". seed: of the random patches. Raises ConfigError.
    """
    if wrong := [method for method in methods if method not in METHODS]:
        raise ConfigError(f"there is no method {wrong[0]!r}, the methods are {', '.join(METHODS)}")
    if inner not in ("off", "on", "both"):
        raise ConfigError(f"inner is {inner!r}, it must be on, off or both")
    vision = RememberingVision(model.vision)
    layers = model.identity.language_layers
    merging = published_inner(layers)
    if inner != "off" and merging is None:
        raise ConfigError(f"inner merging needs an LLM of at least 2 layers, this one has {layers}")
    everywhere: dict[str, list[InnerMerging | None]] = {"off": [None], "on": [merging], "both": [None, merging]}
    configs = {
        ratio: preset(
            PRESET, ratio, depth=vision.geometry.layers, llm_layers=layers, frames=frames, pooling=vision.pooling,
            newline=vision.newline,
        )
        for ratio in retain
    }
    if "calibrated" in methods:
        budgets = calibrated_budgets(vision, list(configs.values()), calibration)
    whole = whole_tower(vision)
    rows: list[Row] = []

    def add(method: str, tower: Tower, ratio: float | None = None, **rest: Any) -> None:
        for merge in everywhere["off" if method in CONTROLS and inner == "both" else inner]:
            name = method + ("" if ratio is None else f" r={ratio:g}") + (" inner" if merge else "")
            rows.append(Row(name, tower, inner=merge, method=method, retain=ratio, **rest))

    for method in methods:
        if method == "full":
            add(method, whole, choose=lambda features, _: kept(vision, features, slice(None)))
            continue
        for ratio, config in configs.items():
            if method == "released":
                add(method, adaptive_tower(vision, config), ratio)
            elif method in CONTROLS:
                count = derive_shapes(config, vision.geometry).visual_tokens
                add(method, whole, ratio, choose=control(method, vision, count, seed))
            else:
                fixed = config if method == "static" else config.replace(frame_budgets=budgets[ratio])
                add(method, static_tower(vision, fixed), ratio, budgets=fixed.frame_budgets)
    return rows


def whole_tower(vision: RememberingVision) -> Tower:
    """Frames uint8 [T, H, W, 3] -> all pooled features [T, P, L] of the unpruned model."""
    return Tower(vision, lambda frames: pool(vision.project(vision.encode(frames)), vision.pooling))


def kept(vision: Vision, features: Tensor, index: Any) -> Tensor:
    """Those of the T*P patches of [T, P, L] that `index` takes, in order, as the LLM takes them: newlines included."""
    t, p, width = features.shape
    stays = torch.zeros(t * p, dtype=torch.bool, device=features.device)
    stays[index] = True
    tokens = features.flatten(0, 1)[stays]
    if vision.newline == "grid":
        positions = torch.where(stays.view(t, p), torch.arange(p, device=features.device), -1)
        return grid_sequence(tokens, positions, vision.image_newline, pooled_grid(vision.geometry.grid, vision.pooling))
    return tokens if vision.newline == "no_token" else torch.cat([tokens, vision.image_newline[None]])


def control(method: str, vision: Vision, count: int, seed: int = 0) -> Callable[[Tensor, int], Tensor]:
    """What keeps `count` patches without looking, of features [T, P, L] of a clip.

    "first": the first frames; "uniform": whole frames, each from the middle of an equal stretch of the clip; of both
    the last frame is cut to fit, in reading order. "random": patches drawn anew for each clip, from seed and index.
    """
    def choose(features: Tensor, index: int) -> Tensor:
        t, p, _ = features.shape
        if method == "random":
            return kept(vision, features, Random(f"control {seed} {index}").sample(range(t * p), count))
        number = -(-count // p)
        at = [i if method == "first" else (2 * i + 1) * t // (2 * number) for i in range(number)]
        return kept(vision, features, [frame * p + patch for frame in at for patch in range(p)][:count])

    return choose


def calibrated_budgets(
    vision: Vision, configs: Sequence[EarlyTomConfig], clips: Iterable[Tensor]
) -> dict[float, tuple[int, ...]]:
    """Retain ratio -> frame budgets: the median over clips of what the released rules leave after each merge layer.

    Rounded to the nearest, half to even, and no lower than what holds the ratio. Raises ConfigError without a clip.
    """
    vision = vision if isinstance(vision, RememberingVision) else RememberingVision(vision)
    counts = [[released_counts(vision, config, clip) for config in configs] for clip in clips]
    return {
        config.retain: percentile_budgets([clip[i] for clip in counts], DEFAULT_PERCENTILE, config)
        for i, config in enumerate(configs)
    }


def released_counts(vision: Vision, config: EarlyTomConfig, frames: Tensor) -> tuple[int, ...]:
    """Frames that each merge layer leaves of one clip uint8 [T, H, W, 3], as reference.frame_counts, in less time."""
    (merged,) = merge_clip(vision, config, frames, [None])
    return merged.counts


class Tower:
    """A row's tower; saved: seconds of its last call that it did not take, because a layer remembered them."""

    def __init__(self, vision: RememberingVision, run: Callable[[Tensor], Tensor]) -> None:
        self.vision, self.run, self.saved = vision, run, 0.0

    def __call__(self, frames: Tensor) -> Tensor:
        before = self.vision.clock.saved
        made = self.run(frames.to(self.vision.device))
        self.saved = self.vision.clock.saved - before
        return made


def adaptive_tower(vision: RememberingVision, config: EarlyTomConfig) -> Tower:
    """Frames uint8 [T, H, W, 3] -> visual tokens [N, L] of the released method."""
    tower = AdaptiveTower(vision, config)
    return Tower(vision, lambda frames: tower.encode(frames).tokens)


def static_tower(vision: RememberingVision, config: EarlyTomConfig) -> Tower:
    """Frames uint8 [T, H, W, 3] -> visual tokens [N, L] of the static form."""
    tower = StaticTower(vision, config)
    return Tower(vision, lambda frames: split_videos(tower(frames[None]), config, tower.shapes.pooled_grid)[0].tokens)
