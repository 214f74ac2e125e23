"""Newlines among the visual tokens: one at the end (LLaVA-OneVision), or one a row of the grid (LLaVA-Video)."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import EarlyTomConfig
from .ranking import rank
from .shapes import StaticShapes
from .tokens import gather_tokens


def append_newline(tokens: Tensor, newline: Tensor) -> Tensor:
    """Tokens [V, F, n, L] -> [V, F*n + 1, L], the newline embedding [L] last (OneVision)."""
    flat = tokens.flatten(1, 2)
    return torch.cat([flat, newline.expand(flat.shape[0], 1, -1)], dim=1)


def grid_token_count(positions: Tensor, side: int) -> Tensor:
    """Tokens that `insert_grid_newlines` really fills, int64 [V], for positions [V, F, n]: patches and kept rows.

    A position of -1 is none: frames that keep fewer patches than others are filled up with it.
    """
    rows = torch.arange(side, device=positions.device)
    present = (positions[..., None, :] // side == rows[:, None]).any(-1)  # [V, F, side]
    return present.sum(dim=(1, 2)) + (positions >= 0).sum(dim=(1, 2))


def insert_grid_newlines(tokens: Tensor, positions: Tensor, newline: Tensor, side: int) -> Tensor:
    """LLaVA-Video's "grid" order in a fixed shape: a newline after each row of a frame's grid that kept a patch.

    tokens [V, F, n, L] at positions [V, F, n] on a side x side grid, newline [L] -> [V, F * (n + min(side, n)), L].
    The first `grid_token_count(positions, side)` tokens are the sequence; the rest is padding with the newline.
    Within a row, tokens keep their order. Static frames have newlines too (quirk 5: the released code drops them).
    """
    v, f, n, width = tokens.shape
    device = tokens.device
    rows = torch.div(positions, side, rounding_mode="trunc")  # [V, F, n]; // would export as a floor of eight operators
    order = rank(-rows.to(torch.float32))  # patches by row, stable
    row_index = torch.arange(side, device=device)
    present = (rows[..., None, :] == row_index[:, None]).any(-1).to(torch.int64)  # [V, F, side]
    rows_before = ((row_index < rows[..., None]) * present[..., None, :]).sum(-1)  # kept rows above each patch
    slot = order + rows_before  # [V, F, n]: where each patch goes within its frame
    filled = n + present.sum(-1)  # [V, F]

    # Frames follow one another without gaps: shift each by what the frames before it fill.
    offset = filled.to(torch.float32).cumsum(-1).to(torch.int64) - filled
    absolute = (slot + offset[..., None]).flatten(1)  # [V, F*n]
    capacity = f * (n + min(side, n))
    source = torch.arange(f * n, device=device).expand(v, -1)
    # Every slot starts as the newline (index F*n of the table) and patches are written over it: slots are distinct.
    table = torch.full((v, capacity), f * n, dtype=torch.int64, device=device).scatter(1, absolute, source)
    rows_and_newline = append_newline(tokens, newline)
    return gather_tokens(rows_and_newline, table)


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
