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
