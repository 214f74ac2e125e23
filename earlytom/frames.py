"""Which frames are merged: similarity -> segments -> plan -> one product with a row-stochastic matrix.

Stage I of EarlyTom with fixed shapes and no branch on data (docs/method.md, section 4). Everything here takes leading
batch dimensions `...` and is made of gathers, comparisons and small sums: no sort whose ties a backend may break its
own way, no product that a reduced-precision matrix unit could round (0/1 matrices apart).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError, InputError
from .ranking import positions_of, precedes


class Segments(NamedTuple):
    """For each frame [..., T], int64: the first and the last frame of its segment."""

    first: Tensor
    last: Tensor

    @property
    def dynamic(self) -> Tensor:
        """bool [..., T]: first or last of a segment, hence every frame of a segment of at most two."""
        index = torch.arange(self.first.shape[-1], device=self.first.device)
        return (index == self.first) | (index == self.last)


class Rules(NamedTuple):
    """What the released walk over the middle frames does to each frame, all [..., T].

    head: starts a merged pair (i, i+1); weight: its w, the pair's row being w*f[i] + (1-w)*f[i+1] (1 elsewhere);
    removed: absorbed as the second of a pair, or dropped (quirk 1: the last middle frame, reached unmerged).
    """

    head: Tensor
    weight: Tensor
    removed: Tensor


def similarity(hidden: Tensor) -> Tensor:
    """Hidden states [..., T, S, D] -> C [..., T, T] float32: mean over S of the cosine between two frames' tokens."""
    patches = hidden.shape[-2]
    flat = F.normalize(hidden.to(torch.float32), dim=-1).flatten(-2)
    return flat @ flat.transpose(-1, -2) / patches


def segments(similarity: Tensor, *, tau: float, max_window: int, ema: float) -> Segments:
    """Segments of similar neighbouring frames from C [..., T, T].

    A frame i starts a new segment when the smoothed similarity to the segment's first frame s falls below tau, or when
    i - s + 1 reaches max_window. Source: `compression` in the released siglip_encoder.py.
    """
    frames = _frames_of(similarity)
    index = torch.arange(frames, device=similarity.device)
    steps = max(1, min(max_window - 1, frames - 1))
    # band[d - 1, s] = C[s, s + d], clamped at the end of the clip where it is not used
    offsets = torch.arange(1, steps + 1, device=similarity.device)[:, None]
    band = similarity.flatten(-2)[..., index * frames + (index + offsets).clamp(max=frames - 1)]

    smoothed = torch.ones_like(band[..., 0, :])
    cut = torch.full_like(smoothed, frames, dtype=torch.int64)
    for d in range(1, steps + 1):
        smoothed = ema * band[..., d - 1, :] + (1 - ema) * smoothed
        ends = (smoothed < tau) | (d + 1 >= max_window)
        cut = torch.where(ends & (index + d < frames) & (cut == frames), index + d, cut)

    # Segment starts: what is reached from frame 0 along s -> cut[s]; node T is the end and stays.
    nodes = torch.arange(frames + 1, device=similarity.device)
    successor = torch.cat([cut, torch.full_like(cut[..., :1], frames)], dim=-1)
    origin = (nodes == 0).expand(successor.shape)
    starts = _reached(origin, successor, frames)[..., None, :frames]  # [..., 1, T]
    until = index <= index[:, None]  # row i sees the frames up to i
    first = torch.where(starts & until, index, -1).amax(-1)
    last = torch.where(starts & ~until, index, frames).amin(-1) - 1
    return Segments(first, last)


def merge_rules(similarity: Tensor, parts: Segments) -> Rules:
    """The released walk over the middle frames of all segments at once. Source: `fine_segment` of the released code."""
    frames = _frames_of(similarity)
    index = torch.arange(frames, device=similarity.device)
    flat = similarity.flatten(-2)
    first, last = parts

    def neighbour(at: Tensor) -> Tensor:
        """C[i, i + 1], the index clamped where it is not used."""
        return flat[..., at.clamp(max=frames - 2) * frames + (at + 1).clamp(max=frames - 1)]

    threshold = flat.gather(-1, first * frames + last)
    current = neighbour(index) if frames > 1 else torch.zeros_like(threshold)
    has_next = index + 2 < last
    following = torch.where(has_next, neighbour(index + 1), 0.0) if frames > 1 else current

    walks = (index > first) & (index < last - 1)  # the walk stops before the last middle frame
    joins = walks & (current > threshold) & (~has_next | (current > following))
    successor = index + walks.to(torch.int64) + joins.to(torch.int64)
    visited = _reached(walks & (index == first + 1), successor.clamp(max=frames - 1), frames)

    head = visited & joins
    weight = torch.where(head & (following != 0), current / (current + following), 1.0)
    absorbed = torch.cat([torch.zeros_like(head[..., :1]), head[..., :-1]], dim=-1)  # TensorRT pads no booleans
    # The last middle frame is removed when the walk reaches it; one that is alone in the middle is never walked to.
    dropped = visited & (index == last - 1) & (last - first > 2)
    return Rules(head, weight, absorbed | dropped)


def plan(similarity: Tensor, *, budget: int, tau: float, max_window: int, ema: float) -> Tensor:
    """Weights W [..., budget, T] float32 that leave exactly `budget` frames of C [..., T, T]; every row sums to 1.

    Exactly T - budget frames go: first those that the released rules remove, then others, each group by falling
    similarity to the frame before, ties to the lower index; frame 0 stays. Where the rules remove exactly that many,
    W is the released merging. A frame that the rules remove but the budget keeps comes back whole, and its partner
    too; a frame removed beyond the rules is averaged into the nearest kept frame before it.
    Source: docs/method.md, section 4.

    Raises ConfigError when the budget is not in 1..T.
    """
    frames = _frames_of(similarity)
    if not 1 <= budget <= frames:
        raise ConfigError(f"the frame budget {budget} does not fit {frames} frames: it must lie in 1..{frames}")
    rules = merge_rules(similarity, segments(similarity, tau=tau, max_window=max_window, ema=ema))
    index = torch.arange(frames, device=similarity.device)

    previous = similarity.flatten(-2)[..., (index - 1).clamp(min=0) * frames + index]
    group = torch.where(index == 0, -1, rules.removed.to(torch.int64))
    goes_before = (group[..., None, :] > group[..., :, None]) | (
        (group[..., None, :] == group[..., :, None]) & precedes(previous)
    )
    removed = goes_before.to(torch.int64).sum(-1) < frames - budget
    kept = ~removed

    # Rows before anything beyond the rules is averaged in: diagonal and the entry right of it.
    pairs = rules.head & torch.cat([removed[..., 1:], torch.zeros_like(removed[..., :1])], dim=-1)
    own = torch.where(pairs, rules.weight, 1.0)
    partner = torch.where(pairs, 1 - rules.weight, 0.0)

    extra = removed & ~rules.removed
    before = torch.where(kept[..., None, :] & (index <= index[:, None]), index, 0).amax(-1)  # kept frame at or before i
    joined = (kept | extra)[..., None, :] & (before[..., None, :] == index[:, None])  # [..., row, i]: i is part of row
    members = joined.to(torch.float32)
    shifted = F.pad(members[..., :-1] * partner[..., None, :-1], (1, 0))
    rows = (members * own[..., None, :] + shifted) / members.sum(-1, keepdim=True).clamp(min=1)

    slots = positions_of(kept, budget)
    return rows.gather(-2, slots[..., None].expand(*slots.shape, frames))


def apply_plan(weights: Tensor, values: Tensor) -> Tensor:
    """W [..., B, T] applied to values [..., T, *rest] -> [..., B, *rest], in the dtype of the values."""
    lead = weights.dim() - 2
    flat = values.flatten(lead + 1)
    return (weights.to(values.dtype) @ flat).view(*weights.shape[:-1], *values.shape[lead + 1 :])


def _reached(origin: Tensor, successor: Tensor, steps: int) -> Tensor:
    """bool [..., N]: the nodes reached from `origin` (bool [..., N]) in at most `steps` hops of i -> successor[..., i].

    Pointer jumping: log2(steps) squarings of a 0/1 matrix. Every entry is a small whole number, exact in any precision.
    """
    nodes = torch.arange(successor.shape[-1], device=successor.device)
    jump = (successor[..., :, None] == nodes).to(torch.float32)
    reached = origin.to(torch.float32)[..., None, :]
    for _ in range(max(1, steps).bit_length()):
        reached = (reached + reached @ jump).clamp(max=1)
        jump = jump @ jump
    return reached[..., 0, :] > 0.5


def _frames_of(similarity: Tensor) -> int:
    if similarity.dim() < 2 or similarity.shape[-1] != similarity.shape[-2]:
        raise InputError(f"the similarity has shape {list(similarity.shape)}, it must be square: [..., T, T]")
    return similarity.shape[-1]
