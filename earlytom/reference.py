"""The oracle: EarlyTom as its authors released it, with dynamic shapes, written to be read.

It gives the released code's own answers (tests/golden) and is what the static tower is measured against. The quirks of
that code are numbered as in docs/method.md: those that change an answer are reproduced and marked, those that are plain
errors are not. Frames are T, patches S, pooled patches P, LLM width L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError, InputError
from .shapes import window_sizes
from .tokens import select_contextual
from .vision.siglip import Vision, pool


def cosine(a: Tensor, b: Tensor) -> float:
    """Mean over the S positions of the cosine similarity between two frames [S, D]."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).mean().item()


def segment_frames(hidden: Tensor, *, tau: float, max_window: int, ema: float) -> list[tuple[int, int]]:
    """First and last frame of each segment of hidden [T, S, D], in order."""
    segments: list[tuple[int, int]] = []
    start, smoothed = 0, 1.0
    for i in range(1, len(hidden)):
        smoothed = ema * cosine(hidden[start], hidden[i]) + (1 - ema) * smoothed
        if smoothed < tau or i - start + 1 >= max_window:
            segments.append((start, i - 1))
            start, smoothed = i, 1.0
    return [*segments, (start, len(hidden) - 1)]


def middle_weights(middle: Tensor, threshold: float) -> list[dict[int, float]]:
    """How the frames between a segment's first and last are merged: for each frame left, {source frame: weight}.

    middle [m, S, D]. Two or more are walked over in pairs; the walk stops before the last one, so that when it is
    reached unmerged it does not contribute (quirk 1).
    """
    if len(middle) < 2:
        return [{i: 1.0} for i in range(len(middle))]
    similarity = [cosine(a, b) for a, b in zip(middle, middle[1:])]
    rows: list[dict[int, float]] = []
    i = 0
    while i < len(similarity):
        current = similarity[i]
        following = similarity[i + 1] if i + 1 < len(similarity) else None
        if current > threshold and (following is None or current > following):
            weight = current / (current + following) if following else 1.0
            rows.append({i: weight, i + 1: 1 - weight})
            i += 2
        else:
            rows.append({i: 1.0})
            i += 1
    return rows


def merge_plan(
    hidden: Tensor, *, tau: float, max_window: int, ema: float
) -> tuple[list[tuple[int, int]], list[dict[int, float]]]:
    """What stage I does to hidden [T, S, D]: its segments, and for each frame left its mix {source frame: weight}."""
    segments = segment_frames(hidden, tau=tau, max_window=max_window, ema=ema)
    rows: list[dict[int, float]] = []
    for start, end in segments:
        rows.append({start: 1.0})
        if end - start > 1:
            walked = middle_weights(hidden[start + 1 : end], cosine(hidden[start], hidden[end]))
            rows += [{start + 1 + i: w for i, w in row.items()} for row in walked]
        if end > start:
            rows.append({end: 1.0})
    return segments, rows


def merge_frames(
    hidden: Tensor, received: Tensor, *, tau: float, max_window: int, ema: float, refine: bool = False
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Stage I at one merge layer: hidden [T, S, D], received [T, S] -> both with fewer frames, and the segments.

    The segments are those of the frames that came in or, with `refine`, those of the merged frames (what stage II uses
    after the last merge layer). Source: `compression` of the released siglip_encoder.py.
    Raises InputError when the shapes do not fit.
    """
    if hidden.dim() != 3 or received.shape != hidden.shape[:2] or len(hidden) == 0:
        raise InputError(
            f"hidden has shape {list(hidden.shape)} and received {list(received.shape)}, "
            "they must be [T, S, D] and [T, S]"
        )
    segments, rows = merge_plan(hidden, tau=tau, max_window=max_window, ema=ema)

    def mix(values: Tensor) -> Tensor:
        return torch.stack([reduce(torch.add, (w * values[i] for i, w in row.items())) for row in rows])

    merged = mix(hidden)
    if refine:
        segments = segment_frames(merged, tau=tau, max_window=max_window, ema=ema)
    return merged, mix(received), segments


def select_tokens(
    features: Tensor,
    received: Tensor,
    segments: Sequence[tuple[int, int]],
    *,
    retain_ratio: float,
    contextual: float = 0.0,
    neighbours: int = 7,
    beta: float = 0.6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage II: pooled features [B, P, D], received [B, P] -> (tokens [N, D], frame [N], position [N]).

    retain_ratio is r', the share of the B * P patches to keep. Dynamic frames (the ends of a segment, and all of a
    segment of two) keep the ceil(P*r') most attended patches; static frames one patch in each of round(P*r') windows.
    contextual is D, neighbours K, beta the blend. Source: `spatial_compression` of the released llava_arch.py.
    Raises InputError when the shapes do not fit, ConfigError when retain_ratio is not in 0..1.
    """
    frames, patches, _ = features.shape
    if received.shape != (frames, patches):
        raise InputError(f"received has shape {list(received.shape)}, it must be {[frames, patches]} like the features")
    if not 0 < retain_ratio <= 1:
        raise ConfigError(f"retain_ratio is {retain_ratio}, it must be above 0 and at most 1")
    budget = math.ceil(patches * retain_ratio)
    dominant = round(budget * (1 - contextual))
    sizes = window_sizes(patches, max(1, round(patches * retain_ratio)))
    tokens, frame, position = [], [], []
    for start, end in ((int(first), int(last)) for first, last in segments):
        for f in range(start, end + 1):
            if f not in (start, end):
                places, at = [], 0
                for size in sizes:
                    places.append(at + int(received[f, at : at + size].argmax()))
                    at += size
                kept = torch.tensor(places)
                chosen = features[f, kept]
            elif budget > dominant:
                chosen, kept = (
                    x[0]
                    for x in select_contextual(
                        features[f : f + 1], received[f : f + 1], dominant=dominant, contextual=budget - dominant,
                        neighbours=neighbours, beta=beta,
                    )
                )
            else:
                kept = received[f].sort(descending=True, stable=True).indices[:budget].sort().values
                chosen = features[f, kept]
            tokens.append(chosen)
            frame.append(torch.full((len(kept),), f))
            position.append(kept.cpu())
    return torch.cat(tokens), torch.cat(frame), torch.cat(position)


class OracleTrace(NamedTuple):
    """What the oracle made of one clip of T frames, of which B are left.

    tokens [N, L]: without newlines; frame, position [N]: of each token, among the frames left and on the pooled grid;
    segments: of the frames left; received [B, P]: pooled attention; stages: hidden states [T_in, S, D] that entered
    each merge layer's merging, and those [T_out, S, D] that left it.
    """

    tokens: Tensor
    frame: Tensor
    position: Tensor
    segments: list[tuple[int, int]]
    received: Tensor
    stages: tuple[tuple[Tensor, Tensor], ...]


@torch.no_grad()
def trace_video(
    model: object,
    frames: Tensor,
    *,
    retain_ratio: float,
    tau: float,
    max_window: int,
    ema: float,
    merge_layers: Sequence[int],
    contextual: float = 0.0,
    neighbours: int = 7,
    beta: float = 0.6,
) -> OracleTrace:
    """The oracle on one clip uint8 [T, H, W, 3]: encoder with stage I, projector, stage II; see `encode_video`."""
    vision = _vision_of(model)
    layers = list(merge_layers)
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= len(vision.layers):
        raise ConfigError(f"merge_layers are {layers}, they must be rising numbers in 0..{len(vision.layers) - 1}")
    side = vision.geometry.image_size
    frames = torch.as_tensor(frames, device=vision.device)  # NumPy's too
    if frames.dim() != 4 or frames.shape[1:] != (side, side, 3) or frames.dtype != torch.uint8:
        raise InputError(
            f"frames are {frames.dtype} {list(frames.shape)}, they must be torch.uint8 [T, {side}, {side}, 3]"
        )
    hidden = vision.embed(frames)
    received, segments = torch.empty(0), [(0, 0)]
    stages: list[tuple[Tensor, Tensor]] = []
    for index, layer in enumerate(vision.layers):
        hidden, attention = layer(hidden, received=index in layers)
        if index in layers:
            before = hidden
            hidden, received, segments = merge_frames(
                before, attention, tau=tau, max_window=max_window, ema=ema, refine=index == layers[-1]
            )
            stages.append((before, hidden))
    features = pool(vision.project(hidden), vision.pooling)  # [B, P, L]
    pooled = pool(received[..., None].to(features.dtype), vision.pooling)[..., 0]
    ratio = min(1.0, retain_ratio / (len(hidden) / len(frames)))  # r'
    selected = select_tokens(
        features, pooled, segments, retain_ratio=ratio, contextual=contextual, neighbours=neighbours, beta=beta
    )
    return OracleTrace(*selected, segments, pooled, tuple(stages))


@torch.no_grad()
def encode_video(
    model: object,
    frames: Tensor,
    *,
    retain_ratio: float,
    tau: float,
    max_window: int,
    ema: float,
    merge_layers: Sequence[int],
    contextual: float = 0.0,
) -> Tensor:
    """Visual tokens [N, L] of one clip, newlines included: for OneVision the newline embedding comes last.

    model: what `earlytom.load` gave, or its vision part; frames uint8 [T, H, W, 3]. Source: `encode_images_multi` and
    `prepare_inputs_labels_for_multimodal` of the released code. Quirk 2 (r' overwriting r) cannot arise: one video a
    call. Quirk 5 (newlines of static frames) is done right.
    Raises ConfigError for a merge layer that does not exist, InputError for frames of another size.
    """
    vision = _vision_of(model)
    trace = trace_video(
        vision, frames, retain_ratio=retain_ratio, tau=tau, max_window=max_window, ema=ema, merge_layers=merge_layers,
        contextual=contextual,
    )
    return with_newlines(vision, trace)


def with_newlines(vision: Vision, trace: OracleTrace) -> Tensor:
    """The visual tokens of a trace as the LLM takes them [N, L]: with newlines where the checkpoint has them."""
    newline = vision.image_newline[None]
    if vision.newline == "grid":
        return _grid_order(trace.tokens, trace.frame, trace.position, newline, math.isqrt(trace.received.shape[1]))
    return trace.tokens if vision.newline == "no_token" else torch.cat([trace.tokens, newline])


def frame_counts(
    model: object, frames: Tensor, *, tau: float, max_window: int, ema: float, merge_layers: Sequence[int]
) -> list[int]:
    """Frames that each merge layer leaves of this clip: the budgets at which the static tower is this oracle."""
    trace = trace_video(
        model, frames, retain_ratio=1.0, tau=tau, max_window=max_window, ema=ema, merge_layers=merge_layers
    )
    return [len(after) for _, after in trace.stages]


def _grid_order(tokens: Tensor, frame: Tensor, position: Tensor, newline: Tensor, side: int) -> Tensor:
    """LLaVA-Video: a newline after each row of a frame's grid that kept a patch."""
    out = []
    for f in frame.unique(sorted=True):
        row = torch.where(frame == f, position // side, -1)
        for y in range(side):
            if (row == y).any():
                out += [tokens[row == y], newline]
    return torch.cat(out)


def _vision_of(model: object) -> Vision:
    vision = getattr(model, "vision", model)
    if not isinstance(vision, Vision):
        raise InputError(
            f"the model is a {type(model).__name__}, it must be what earlytom.load gives, or its vision part"
        )
    return vision
