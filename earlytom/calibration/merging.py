"""The tower up to the last merge layer, once for several forms of merging: the released rules, and fixed budgets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adaptive import released_count
from ..config import EarlyTomConfig
from ..errors import ConfigError, InputError
from ..frames import apply_plan, plan, similarity
from ..vision.siglip import Vision
from .agreement import Merged, Mix

Form = tuple[int, ...] | None
"""Frame budgets of the static tower, or None: as many frames as the released rules leave."""


@torch.inference_mode()
def merge_clip(vision: Vision, config: EarlyTomConfig, frames: Tensor, forms: Sequence[Form]) -> list[Merged]:
    """What each of `forms` leaves of one clip uint8 [T, H, W, 3], in their order.

    Layers run once for all forms that have left the same frames so far: all up to the first merge layer, and on while
    their counts are the same. Merging is that of AdaptiveTower and StaticTower. config: its budgets are not used.
    Raises ConfigError without merge layers or for budgets that do not fit, InputError for other frames.
    """
    side = vision.geometry.image_size
    if frames.dim() != 4 or not len(frames) or frames.shape[1:] != (side, side, 3) or frames.dtype != torch.uint8:
        raise InputError(f"frames are {frames.dtype} {list(frames.shape)}, they must be uint8 [T, {side}, {side}, 3]")
    layers = config.merge_layers
    if not layers:
        raise ConfigError("nothing is merged without merge layers, so there is nothing to calibrate")
    if wrong := [form for form in forms if form is not None and len(form) != len(layers)]:
        raise ConfigError(f"the frame budgets {list(wrong[0])} do not fit {len(layers)} merge layers")
    found: dict[int, Merged] = {}

    def descend(hidden: Tensor, weights: Tensor, counts: tuple[int, ...], members: list[int]) -> None:
        """hidden [B, S, D] and its mix of source frames [B, T] after `counts`, the same for all `members` of forms."""
        stage = len(counts)
        if stage == len(layers):
            found.update(dict.fromkeys(members, Merged(counts, mix_of(weights))))
            return
        for index in range(layers[stage - 1] + 1 if stage else 0, layers[stage] + 1):
            hidden, _ = vision.layers[index](hidden)
        alike = similarity(hidden)
        by_count: dict[int, list[int]] = {}
        for member in members:
            form = forms[member]
            by_count.setdefault(released_count(alike, config) if form is None else form[stage], []).append(member)
        for count, those in by_count.items():
            step = plan(alike, budget=count, **config.segmenting)
            descend(apply_plan(step, hidden), step @ weights, (*counts, count), those)

    hidden = vision.embed(frames.to(vision.device))
    descend(hidden, torch.eye(len(frames), device=hidden.device), (), list(range(len(forms))))
    return [found[member] for member in range(len(forms))]


def mix_of(weights: Tensor) -> Mix:
    """Weights [B, T] -> the mix of each row."""
    return tuple(
        tuple((frame, weight) for frame, weight in enumerate(row) if weight) for row in weights.to("cpu").tolist()
    )
