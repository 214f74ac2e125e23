"""Choices that two backends made differently, each with its margin: how far the deciding score was from the other side.

A margin is measured on the scores of the reference; the error is the largest difference of that score between the two
backends. The rules are those of frames.py, walked here one frame after another so that each choice can be named.
Source: docs/method.md, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import EarlyTomConfig
from ..frames import Segments, merge_rules, plan, segments
from ..shapes import StaticShapes
from .results import ROUNDING, Flip

PRESENT = 1e-6  # a source frame with less weight than this is not part of a mix


class Place(NamedTuple):
    """Where a choice was made: the video, the merge layer (None after the last) and the error of its score there."""

    video: int
    layer: int | None
    error: float

    def flip(self, kind: str, frame: int, margin: float | None, what: str, scale: float = 1.0) -> Flip:
        """scale: the size of the score, 1 for a similarity."""
        known = margin if margin is not None and math.isfinite(margin) else None
        return Flip(kind, self.video, self.layer, frame, known, self.error, what, ROUNDING * scale)


def sources(weights: Tensor) -> list[frozenset[int]]:
    """The source frames that each row of W [B, T] is a mix of."""
    return [frozenset(row.nonzero().flatten().tolist()) for row in weights.abs() > PRESENT]


def plan_flips(
    mine: Tensor, my_weights: Tensor, theirs: Tensor, their_weights: Tensor, config: EarlyTomConfig, place: Place
) -> list[Flip]:
    """Choices behind two different plans of one merge layer; mine are the reference's C [T, T] and W [B, T].

    Only first causes are named: a choice that follows from an earlier one (another segment, another pair) is not.
    """
    found = [*_cuts(mine, theirs, config, place), *_merges(mine, theirs, config, place)]
    if not found:
        found = list(_ranks(mine, my_weights, their_weights, place))
    odd = [
        name
        for name, similarity, weights in (("reference", mine, my_weights), ("other backend", theirs, their_weights))
        if sources(plan(similarity, budget=len(weights), **config.segmenting)) != sources(weights)
    ]
    if odd or not found:
        what = f"not the plan that the rules make of the similarities of the {' or the '.join(odd) or 'backends'}"
        found.append(place.flip("plan", 0, None, what))
    return found


def mask_flips(
    mine: Tensor, my_mask: Tensor, theirs: Tensor, their_mask: Tensor, config: EarlyTomConfig, place: Place
) -> list[Flip]:
    """Choices behind two different dynamic masks [B] of the same frames; mine are the reference's C [B, B] and mask."""
    found = list(_cuts(mine, theirs, config, place))
    odd = [
        name
        for name, similarity, mask in (("reference", mine, my_mask), ("other backend", theirs, their_mask))
        if not torch.equal(segments(similarity, **config.segmenting).dynamic, mask)
    ]
    if odd or not found:
        what = f"not the mask that the rules make of the similarities of the {' or the '.join(odd) or 'backends'}"
        found.append(place.flip("plan", 0, None, what))
    return found


def patch_flips(
    mine: Tensor, theirs: Tensor, received: Tensor, dynamic: bool, shapes: StaticShapes, frame: int, place: Place
) -> Iterator[Flip]:
    """Patches that one of two backends keeps of one frame, and the other does not.

    mine, theirs: positions [n], the reference's first; received: attention [P] that the reference decided by. Patches
    are paired so that the largest gap is shown: the best that was lost with the worst that was won. A reference that
    keeps more patches (the oracle rounds up) may have that many more.
    """
    dominant = shapes.dominant if dynamic and shapes.contextual else max(len(mine), len(theirs))
    if dominant < len(mine) == len(theirs) and set(mine[dominant:].tolist()) != set(theirs[dominant:].tolist()):
        if torch.equal(mine[:dominant], theirs[:dominant]):
            yield place.flip("contextual", frame, None, "other DPC-KNN centres; their margin is not measured")
    my_set, their_set = set(mine[:dominant].tolist()), set(theirs[:dominant].tolist())
    score = received.tolist()
    if dynamic or len(mine) != len(theirs):
        won = sorted(their_set - my_set, key=score.__getitem__)
        lost = sorted(my_set - their_set, key=score.__getitem__, reverse=True)
        pairs = list(zip(lost, won))
    else:  # one patch of each window, in order
        pairs = [(a, b) for a, b in zip(mine.tolist(), theirs.tolist()) if a != b]
    for a, b in pairs:
        scale = max(abs(score[a]), abs(score[b]))
        yield place.flip("patch", frame, abs(score[a] - score[b]), f"patch {a} against {b}", scale)


def closest_choice(similarity: Tensor, weights: Tensor, config: EarlyTomConfig) -> float:
    """The smallest margin of any choice of a plan: what would flip first. C [T, T], W [B, T]; inf without a choice."""
    parts = segments(similarity, **config.segmenting)
    rules = merge_rules(similarity, parts)
    margins = [smallest_cut_margin(similarity, config)]
    for first, last in _spans(parts):
        for i in _visited(rules.head.tolist(), first, last):
            gaps = [abs(gap) for gap in _gaps(similarity, first, last, i)]
            # To undo a merge one comparison is enough; to make one, all that say no must turn.
            says_no = [abs(gap) for gap in _gaps(similarity, first, last, i) if gap <= 0]
            margins.append(max(says_no) if says_no else min(gaps))
    removed = _removed(weights)
    for group in (True, False):
        members = [i for i in range(1, len(similarity)) if bool(rules.removed[i]) == group]
        scores = [(float(similarity[i - 1, i]), i in removed) for i in members]
        gone, left = [s for s, out in scores if out], [s for s, out in scores if not out]
        if gone and left:
            margins.append(min(gone) - max(left))
    return min(margins)


def smallest_cut_margin(similarity: Tensor, config: EarlyTomConfig) -> float:
    """The smallest |E - tau| of the segments of C [T, T]; inf when the window bound decides them all."""
    first = segments(similarity, **config.segmenting).first.tolist()
    starts = ((first[i - 1], i) for i in range(1, len(first)))
    by_score = [(s, i) for s, i in starts if i - s + 1 < config.max_window]
    return min((abs(_smoothed(similarity, s, i, config.ema) - config.tau) for s, i in by_score), default=math.inf)


def _cuts(mine: Tensor, theirs: Tensor, config: EarlyTomConfig, place: Place) -> Iterator[Flip]:
    my_first, their_first = (segments(c, **config.segmenting).first.tolist() for c in (mine, theirs))
    for i in range(1, len(my_first)):
        start = my_first[i - 1]
        if start == their_first[i - 1] and (my_first[i] == i) != (their_first[i] == i):
            margin = abs(_smoothed(mine, start, i, config.ema) - config.tau)
            what = f"a segment starts at frame {i} in {'the reference' if my_first[i] == i else 'the other backend'}"
            yield place.flip("cut", i, margin, f"{what} only (E against tau)")


def _merges(mine: Tensor, theirs: Tensor, config: EarlyTomConfig, place: Place) -> Iterator[Flip]:
    my_parts, their_parts = (segments(c, **config.segmenting) for c in (mine, theirs))
    my_head, their_head = (merge_rules(c, p).head.tolist() for c, p in ((mine, my_parts), (theirs, their_parts)))
    for first, last in set(_spans(my_parts)) & set(_spans(their_parts)):
        for i in sorted({*_visited(my_head, first, last)} & {*_visited(their_head, first, last)}):
            if my_head[i] == their_head[i]:
                continue
            gaps = zip(_gaps(mine, first, last, i), _gaps(theirs, first, last, i))
            turned = [abs(a) for a, b in gaps if (a > 0) != (b > 0)]
            what = f"frames {i} and {i + 1} are merged in {'the reference' if my_head[i] else 'the other backend'} only"
            yield place.flip("merge", i, max(turned, default=None), what)


def _ranks(mine: Tensor, my_weights: Tensor, their_weights: Tensor, place: Place) -> Iterator[Flip]:
    my_removed, their_removed = _removed(my_weights), _removed(their_weights)

    def score(i: int) -> float:
        return float(mine[i - 1, i]) if i else math.inf  # frame 0 never goes

    lost = sorted(my_removed - their_removed, key=score, reverse=True)
    won = sorted(their_removed - my_removed, key=score)
    for a, b in zip(lost, won):
        what = f"the budget removes frame {a} in the reference and frame {b} in the other backend"
        yield place.flip("rank", a, abs(score(a) - score(b)), what)


def _removed(weights: Tensor) -> set[int]:
    """Frames that have no row of their own in W [B, T]; a row's own frame is the first of its sources."""
    return set(range(weights.shape[1])) - {min(row, default=-1) for row in sources(weights)}


def _spans(parts: Segments) -> list[tuple[int, int]]:
    return sorted(set(zip(parts.first.tolist(), parts.last.tolist())))


def _visited(head: list[bool], first: int, last: int) -> Iterator[int]:
    """Frames at which the walk over the middle of a segment decides."""
    i = first + 1
    while i < last - 1:
        yield i
        i += 2 if head[i] else 1


def _gaps(similarity: Tensor, first: int, last: int, i: int) -> list[float]:
    """What a merge of frames i and i + 1 compares, each as a difference that must be above 0."""
    current = similarity[i, i + 1]
    gaps = [float(current - similarity[first, last])]
    if i + 2 < last:
        gaps.append(float(current - similarity[i + 1, i + 2]))
    return gaps


def _smoothed(similarity: Tensor, start: int, i: int, ema: float) -> float:
    """E at frame i of a segment that starts at `start`."""
    value = 1.0
    for at in range(start + 1, i + 1):
        value = ema * float(similarity[start, at]) + (1 - ema) * value
    return value
