"""Which patches of each frame stay: stage II of EarlyTom in fixed shapes.

Dynamic frames keep the patches that received most attention, static frames the best patch of each contiguous window;
both selections are made for every frame and the dynamic mask chooses. F frames, P pooled patches, n kept, L LLM width;
`...` are batch dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .clustering import dpc_knn, merge_clusters
from .ranking import first_in_order, positions_of, rank
from .shapes import window_sizes


def select_positions(received: Tensor, dynamic: Tensor, keep: int) -> Tensor:
    """Positions [..., F, keep] int64, rising, of the patches that stay.

    received: attention each patch received [..., F, P]; dynamic: bool [..., F]. Source:
    `merge_tokens_by_attention_frame` and `merge_tokens_by_local_window` of the released code, with one patch a window.
    """
    sizes = window_sizes(received.shape[-1], keep)
    # A constant made in Python: repeat_interleave would leave a data-dependent shape in an exported graph.
    window = torch.tensor([w for w, size in enumerate(sizes) for _ in range(size)], device=received.device)
    most_attended = rank(received) < keep
    best_of_window = rank(received, within=window[:, None] == window) == 0
    chosen = dynamic[..., None]
    # Not torch.where: ONNX Runtime has no Where of booleans.
    return positions_of((chosen & most_attended) | (~chosen & best_of_window), keep)


def gather_tokens(features: Tensor, positions: Tensor) -> Tensor:
    """Features [..., P, L] at positions [..., n] -> [..., n, L]."""
    return features.gather(-2, positions[..., None].expand(*positions.shape, features.shape[-1]))


def select_contextual(
    features: Tensor, received: Tensor, *, dominant: int, contextual: int, neighbours: int, beta: float
) -> tuple[Tensor, Tensor]:
    """Tokens and positions of dynamic frames when a share of their budget is contextual (D > 0).

    features [F, P, L], received [F, P] -> ([F, dominant + contextual, L], [F, dominant + contextual]): the `dominant`
    most attended patches in position order, then DPC-KNN centres among the others, each merged with the patches
    nearest to it. Source: `merge_tokens_by_attention_frame` of the released code, right for any batch (quirk 6).
    """
    ranks = rank(received)
    leading = first_in_order(ranks, dominant)
    left = positions_of(ranks >= dominant, received.shape[-1] - dominant)
    left_over = gather_tokens(features, left)
    centres = dpc_knn(left_over, clusters=contextual, neighbours=min(neighbours, contextual))
    merged = merge_clusters(left_over, centres, beta=beta, blend=True)
    tokens = torch.cat([gather_tokens(features, leading), merged], dim=-2)
    return tokens, torch.cat([leading, left.gather(-1, centres)], dim=-1)


def append_newline(tokens: Tensor, newline: Tensor) -> Tensor:
    """Tokens [V, F, n, L] -> [V, F*n + 1, L], the newline embedding [L] last (OneVision)."""
    flat = tokens.flatten(1, 2)
    return torch.cat([flat, newline.expand(flat.shape[0], 1, -1)], dim=1)


def grid_token_count(positions: Tensor, side: int) -> Tensor:
    """Patches and rows they lie in, int64 [V], for positions [V, F, n], -1 standing for none.

    That many tokens of its sequence `insert_grid_newlines` really fills.
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


def grid_sequence(tokens: Tensor, positions: Tensor, newline: Tensor, side: int) -> Tensor:
    """The "grid" order of one video whose frames keep different numbers of patches: tokens [N, L] -> [N + rows, L].

    tokens are those of positions [F, n], frame by frame, -1 standing for none; newline [L]. As `insert_grid_newlines`,
    without its padding: the length depends on data.
    """
    row = torch.arange(len(positions), device=positions.device)[:, None] * side + positions // side
    row, order = row[positions >= 0].sort(stable=True)
    ends = torch.cat([row[1:] != row[:-1], row.new_ones(1, dtype=torch.bool)])  # the last patch of its row
    slot = torch.arange(len(row), device=row.device) + ends.cumsum(0) - ends.to(torch.int64)
    sequence = newline.to(tokens).repeat(len(row) + int(ends.sum()), 1)
    sequence[slot] = tokens[order]
    return sequence
