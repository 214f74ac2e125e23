"""The first hop: the oracle, whose frame counts come from the data, and the static tower at those counts.

It tests the method: float32 on both sides, the same weights, the same clip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..config import EarlyTomConfig
from ..errors import ConfigError
from ..frames import similarity
from ..shapes import StaticShapes
from ..tower import Stage, StaticTower
from ..vision.siglip import Vision, pool
from .numbers import Aligned, Hop, align, measure
from .traces import VideoTrace, split_trace

ORACLE, STATIC = "oracle", "static"


class OracleHop(NamedTuple):
    """The oracle's own trace, the numbers of the hop, and what the static tower was given: config at these budgets."""

    expected: VideoTrace
    aligned: Aligned
    numbers: Hop
    config: EarlyTomConfig
    shapes: StaticShapes


@torch.no_grad()
def oracle_hop(vision: Vision, clip: Tensor, config: EarlyTomConfig) -> OracleHop:
    """The oracle on clip uint8 [T, H, W, 3] against the static tower at the budgets that the oracle itself arrives at.

    Raises ConfigError when no static tower can have these budgets.
    """
    expected = oracle_trace(vision, clip, config)
    counts = tuple(len(stage.weights) for stage in expected.stages)
    try:
        if counts:  # the oracle's share of patches is at most 1
            config = config.replace(frame_budgets=counts, retain=min(config.retain, counts[-1] / config.frames))
        tower = StaticTower(vision, config).eval()
    except ConfigError as error:
        raise ConfigError(f"the oracle left {counts} frames: {error}") from None
    actual = split_trace(tower.trace(clip[None].to(vision.device)), config, tower.shapes)
    aligned = align([expected], actual, config, tower.shapes)
    return OracleHop(expected, aligned, measure(aligned, (ORACLE, STATIC), "fp32"), config, tower.shapes)


@torch.no_grad()
def oracle_trace(vision: Vision, frames: Tensor, config: EarlyTomConfig) -> VideoTrace:
    """The oracle on one clip uint8 [T, H, W, 3], with what it chose and from which scores; budgets are not used.

    Its tokens are `encode_video`'s. Without merge layers the oracle is the unpruned model. Everything comes back on
    the CPU.
    """
    newlines = vision.image_newline[None][: config.newline != "no_token"].cpu()
    if not config.merge_layers:
        t = len(frames)
        tokens = pool(vision.project(vision.encode(frames.to(vision.device))), config.pooling).cpu()
        positions = torch.arange(tokens.shape[1]).expand(t, -1)
        return VideoTrace(tuple(tokens), tuple(positions), newlines, torch.ones(t, dtype=torch.bool), torch.eye(t))
    trace = reference.trace_video(
        vision, frames, retain_ratio=config.retain, merge_layers=config.merge_layers, contextual=config.contextual,
        neighbours=config.neighbours, beta=config.beta, **config.segmenting,
    )
    stages, composite = [], torch.eye(len(frames))
    for before, after in trace.stages:
        weights = _weights(before, config)
        stages.append(Stage(_cosines(before, config.max_window), weights, after.cpu()))
        composite = weights @ composite
    ends = {i for span in trace.segments for i in span}
    left = range(len(composite))
    by_frame, tokens = [trace.frame == f for f in left], trace.tokens.cpu()
    return VideoTrace(
        tuple(tokens[mask] for mask in by_frame), tuple(trace.position[mask] for mask in by_frame), newlines,
        torch.tensor([i in ends for i in left]), composite, tuple(stages),
        _cosines(trace.stages[-1][1], config.max_window), trace.received.cpu(),
    )


def _weights(hidden: Tensor, config: EarlyTomConfig) -> Tensor:
    """W [B, T] of the oracle's merging of hidden [T, S, D]."""
    _, rows = reference.merge_plan(hidden, **config.segmenting)
    weights = torch.zeros(len(rows), len(hidden))
    for b, row in enumerate(rows):
        weights[b, list(row)] = torch.tensor(list(row.values()))
    return weights


def _cosines(hidden: Tensor, max_window: int) -> Tensor:
    """C [T, T] of hidden [T, S, D], the entries that the oracle looks at being its own cosines."""
    table = similarity(hidden).cpu()
    for i in range(len(hidden)):
        for j in range(i + 1, min(len(hidden), i + max(3, max_window))):
            table[i, j] = table[j, i] = reference.cosine(hidden[i], hidden[j])
    return table
