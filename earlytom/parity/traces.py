"""What a backend did with one video, in one form for all backends: the oracle's counts vary, the tower's do not.

Plans and numbers are compared on these (agreement.py, numbers.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import EarlyTomConfig
from ..newlines import token_slots
from ..shapes import StaticShapes
from ..tower import Stage, TowerTrace


class VideoTrace(NamedTuple):
    """What one backend made of one video, and what it chose from; T, S, D, B, P, L as in tower.py.

    tokens and positions: [n, L] and [n] for each of the B frames left, n may differ between them; newlines [m, L]:
    those of the sequence (of the oracle: one); dynamic [B]; weights [B, T]; stages: similarity [T_in, T_in], weights
    [T_out, T_in] and hidden [T_out, S, D] of each merge layer; similarity [B, B]; received [B, P]. The last three are
    (), None and None when a backend shows its outputs only, or when nothing is merged.
    """

    tokens: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]
    newlines: Tensor
    dynamic: Tensor
    weights: Tensor
    stages: tuple[Stage, ...] = ()
    similarity: Tensor | None = None
    received: Tensor | None = None


def split_trace(trace: TowerTrace, config: EarlyTomConfig, shapes: StaticShapes) -> tuple[VideoTrace, ...]:
    """The videos of a call, each with its tokens by frame; newlines are taken out of the sequence."""
    out = []
    for v in range(trace.outputs.tokens.shape[0]):
        sequence, positions, dynamic, weights = (value[v].cpu() for value in trace.outputs)
        slots = token_slots(positions, config, shapes)  # [B, n]
        rest = torch.ones(len(sequence), dtype=torch.bool).index_fill(0, slots.flatten(), False)
        stages = tuple(Stage(*(value[v].cpu() for value in stage)) for stage in trace.stages)
        similarity, received = (None if x is None else x[v].cpu() for x in (trace.similarity, trace.received))
        tokens = sequence[slots]  # [B, n, L]
        out.append(
            VideoTrace(
                tuple(tokens), tuple(positions), sequence[rest], dynamic, weights, stages, similarity, received
            )
        )
    return tuple(out)
