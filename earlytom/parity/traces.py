"""What a backend did with one video, in one form for all backends: the oracle's counts vary, the tower's do not.

Plans and numbers are compared on these (agreement.py, numbers.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..config import EarlyTomConfig
from ..frames import similarity
from ..newlines import insert_grid_newlines
from ..shapes import StaticShapes
from ..tower import Stage, TowerTrace
from ..vision.siglip import Vision, pool


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


def token_slots(positions: Tensor, config: EarlyTomConfig, shapes: StaticShapes) -> Tensor:
    """Where in the sequence [N, L] the patch at each of positions [B, n] stands: int64 [B, n]."""
    b, n = positions.shape
    slots = torch.arange(b * n).view(b, n)
    if config.newline != "grid":
        return slots
    marks = slots.to(torch.float32).view(1, b, n, 1)
    order = insert_grid_newlines(marks, positions[None], torch.tensor([-1.0]), shapes.pooled_grid)[0, :, 0]
    at = torch.zeros(b * n, dtype=torch.int64)
    filled = order >= 0
    at[order[filled].to(torch.int64)] = filled.nonzero().flatten()
    return at.view(b, n)


@torch.no_grad()
def oracle_trace(vision: Vision, frames: Tensor, config: EarlyTomConfig) -> VideoTrace:
    """The oracle on one clip uint8 [T, H, W, 3], with what it chose and from which scores; budgets are not used.

    Made of reference.py's own parts, so its tokens are `encode_video`'s. Without merge layers the oracle is the
    unpruned model. Everything comes back on the CPU.
    """
    settings: dict[str, Any] = {"tau": config.tau, "max_window": config.max_window, "ema": config.ema}
    device = vision.device
    frames = frames.to(device)
    newlines = vision.image_newline[None][: config.newline != "no_token"].cpu()
    if not config.merge_layers:
        t = len(frames)
        tokens = pool(vision.project(vision.encode(frames)), config.pooling).cpu()
        positions = torch.arange(tokens.shape[1]).expand(t, -1)
        return VideoTrace(tuple(tokens), tuple(positions), newlines, torch.ones(t, dtype=torch.bool), torch.eye(t))
    hidden, composite = vision.embed(frames), torch.eye(len(frames), device=device)
    stages: list[Stage] = []
    received, parts = torch.empty(0), [(0, 0)]
    for index, layer in enumerate(vision.layers):
        hidden, attention = layer(hidden, received=index in config.merge_layers)
        if index in config.merge_layers:
            alike, weights = _cosines(hidden, config.max_window), _weights(hidden, settings)
            last = index == config.merge_layers[-1]
            hidden, received, parts = reference.merge_frames(hidden, attention, **settings, refine=last)
            stages.append(Stage(alike, weights, hidden))
            composite = weights @ composite
    final = _cosines(stages[-1].hidden, config.max_window)
    features = pool(vision.project(hidden), config.pooling)  # [B, P, L]
    pooled = pool(received[..., None].to(features.dtype), config.pooling)[..., 0]
    ratio = min(1.0, config.retain / (len(hidden) / len(frames)))  # r'
    tokens, frame, position = reference.select_tokens(
        features, pooled, parts, retain_ratio=ratio, contextual=config.contextual, neighbours=config.neighbours,
        beta=config.beta,
    )  # fmt: skip
    ends = {i for span in parts for i in span}
    by_frame, tokens = [frame == f for f in range(len(hidden))], tokens.cpu()
    return VideoTrace(
        tuple(tokens[mask] for mask in by_frame), tuple(position[mask] for mask in by_frame), newlines,
        torch.tensor([i in ends for i in range(len(hidden))]), composite.cpu(),
        tuple(Stage(*(value.cpu() for value in stage)) for stage in stages), final.cpu(), pooled.cpu(),
    )  # fmt: skip


def _weights(hidden: Tensor, settings: dict[str, Any]) -> Tensor:
    """W [B, T] of the oracle's merging of hidden [T, S, D]: what it does to the columns of the identity."""
    frames, patches = hidden.shape[:2]
    identity = F.pad(torch.eye(frames, device=hidden.device), (0, -frames % patches))
    merged = [reference.merge_frames(hidden, block, **settings)[1] for block in identity.split(patches, dim=1)]
    return torch.cat(merged, dim=1)[:, :frames]


def _cosines(hidden: Tensor, max_window: int) -> Tensor:
    """C [T, T] of hidden [T, S, D], the entries that the oracle looks at being its own cosines."""
    alike = similarity(hidden)
    for i in range(len(hidden)):
        for j in range(i + 1, min(len(hidden), i + max(3, max_window))):
            alike[i, j] = alike[j, i] = reference.cosine(hidden[i], hidden[j])
    return alike
