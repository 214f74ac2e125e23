"""Ranks by comparison: top-k with fixed shapes and one answer on every backend, ties to the lower index.

TopK and ArgMax leave ties to the implementation; a [P, P] comparison of a few hundred scores costs next to nothing and
cannot differ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def precedes(score: Tensor) -> Tensor:
    """bool [..., P, P]: [i, j] is true when j has the higher score of [..., P], or the same and the lower index."""
    index = torch.arange(score.shape[-1], device=score.device)
    mine, other = score[..., :, None], score[..., None, :]
    return (other > mine) | ((other == mine) & (index < index[:, None]))


def rank(score: Tensor, within: Tensor | None = None) -> Tensor:
    """Rank [..., P] int64 of each score [..., P], 0 for the highest, equal scores by rising index.

    within: bool [P, P], an entry competes only with those marked in its row (default: with all).
    """
    ahead = precedes(score)
    if within is not None:
        ahead = ahead & within
    return ahead.to(torch.int64).sum(-1)


def positions_of(mask: Tensor, count: int) -> Tensor:
    """Indices [..., count] int64, rising, of the entries marked in mask [..., P]; exactly `count` must be marked.

    Entry j is the number of positions before which at most j marks lie. Clamped to P - 1, so that scores with NaN
    (no legal ranks) cannot lead a later gather out of bounds.
    """
    marks = mask.to(torch.float32).cumsum(-1)
    slots = torch.arange(count, device=mask.device)
    found = (marks[..., None, :] <= slots[:, None]).to(torch.int64).sum(-1)
    return found.clamp(max=mask.shape[-1] - 1)


def first_in_order(ranks: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the `count` best ranks [..., P], in rising index order."""
    return positions_of(ranks < count, count)
