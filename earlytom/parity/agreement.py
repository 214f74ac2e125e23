"""What two backends chose for the same clip: where their plans agree, and how close each choice that differs was.

A near-tie may flip a choice between two backends that are both right. So choices are compared by themselves: each one
that differs (a flip) is reported with its margin, in the reference, and the numeric error of the score that decided it;
numbers are compared only where the choices agree (see numbers.py). Source: docs/method.md, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import EarlyTomConfig
from ..shapes import StaticShapes
from .flips import Place, closest_choice, mask_flips, patch_flips, plan_flips, smallest_cut_margin, sources
from .results import Flip, PlanAgreement
from .traces import VideoTrace

_AFTER = -1  # the place after the last merge layer


class ScoreErrors(NamedTuple):
    """Largest absolute difference of the scores between two backends, where their plans upstream agree.

    similarity: of each merge layer that could be compared, in order, then of the frames left; received: pooled.
    """

    similarity: tuple[float, ...] = ()
    received: float = 0.0

    def at(self, stage: int) -> float:
        """Of merge layer number `stage`; of the last one known when the plans part before it."""
        return self.similarity[min(stage, len(self.similarity) - 1)] if self.similarity else 0.0


class Agreement(NamedTuple):
    """PlanAgreement of one video, and where its numbers can be compared.

    rows: for each merge layer, (row of the reference, row of the other) of frames left with the same history; without
    stages there is one entry, the frames left at the end; tokens: (frame, index, frame, index) of the same patch.
    """

    plan: PlanAgreement
    rows: tuple[tuple[tuple[int, int], ...], ...]
    tokens: tuple[tuple[int, int, int, int], ...]


def score_errors(reference: VideoTrace, actual: VideoTrace) -> ScoreErrors:
    """Differences of the scores that both show, up to the first layer after which the plans differ."""
    rows = match_frames(reference, actual)
    found: list[float] = []
    for a, b, matched in zip(reference.stages, actual.stages, rows):
        found.append(_max_abs(a.similarity, b.similarity))
        if not len(matched) == len(a.weights) == len(b.weights):
            break
    else:
        if reference.similarity is not None and actual.similarity is not None:
            found.append(_max_abs(reference.similarity, actual.similarity))
    received = 0.0
    if reference.received is not None and actual.received is not None and rows[-1]:
        i, j = (list(x) for x in zip(*rows[-1]))
        received = _max_abs(reference.received[i], actual.received[j])
    return ScoreErrors(tuple(found), received)


def match_frames(reference: VideoTrace, actual: VideoTrace) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Pairs of rows with the same history, after every merge layer; see Agreement.rows."""
    if reference.stages and len(reference.stages) == len(actual.stages):
        pairs = [(a.weights, b.weights) for a, b in zip(reference.stages, actual.stages)]
    else:
        pairs = [(reference.weights, actual.weights)]
    same = {i: i for i in range(pairs[0][0].shape[1])}
    found = []
    for mine, theirs in pairs:
        by_sources = {row: j for j, row in enumerate(sources(theirs))}
        after: dict[int, int] = {}
        for i, row in enumerate(sources(mine)):
            if all(s in same for s in row):
                j = by_sources.get(frozenset(same[s] for s in row))
                if j is not None:
                    after[i] = j
        found.append(tuple(after.items()))
        same = after
    return tuple(found)


def agree(
    reference: VideoTrace, actual: VideoTrace, config: EarlyTomConfig, shapes: StaticShapes, *,
    errors: ScoreErrors | None = None, video: int = 0,
) -> Agreement:
    """Compare the choices of two backends for one video.

    errors: used where `actual` shows no scores of its own, for example those of another backend of the same dtype.
    """
    rows = match_frames(reference, actual)
    shown = not config.merge_layers or bool(reference.stages and actual.stages)
    errors = score_errors(reference, actual) if shown or errors is None else errors
    first, flips = _frame_flips(reference, actual, config, rows[-1], errors, video)
    patches = equal = comparable = comparable_equal = dynamic_equal = 0
    tokens: list[tuple[int, int, int, int]] = []
    other = dict(rows[-1])
    place = Place(video, None, errors.received)
    for i, kept in enumerate(reference.positions):
        j = other.get(i)
        if j is None:
            patches += min(len(kept), shapes.keep)
            continue
        theirs, dynamic = actual.positions[j], bool(reference.dynamic[i])
        same_mark = dynamic == bool(actual.dynamic[j])
        dynamic_equal += same_mark
        if shapes.contextual and dynamic and len(kept) != len(theirs):
            continue  # the oracle rounds up: with another number of centres no token is the same
        possible, common = min(len(kept), len(theirs)), len(set(kept.tolist()) & set(theirs.tolist()))
        patches, equal = patches + possible, equal + common
        if same_mark:
            comparable, comparable_equal = comparable + possible, comparable_equal + common
            if reference.received is not None:
                flips += patch_flips(kept, theirs, reference.received[i], dynamic, shapes, i, place)
            elif common < possible:
                flips.append(place.flip("patch", i, None, "other patches; the reference does not show its scores"))
        tokens += [(i, a, j, b) for a, b in _same_patches(kept, theirs, dynamic, same_mark, shapes)]
    plan = PlanAgreement(
        len(reference.weights), len(other), dynamic_equal, patches, equal, comparable, comparable_equal, first,
        tuple(flips),
    )
    return Agreement(plan, rows, tuple(tokens))


def combine(plans: Sequence[PlanAgreement]) -> PlanAgreement:
    """Several videos as one."""
    names = ("frames", "frames_equal", "dynamic_equal", "patches", "patches_equal", "comparable", "comparable_equal")
    totals: dict[str, int] = {name: sum(getattr(plan, name) for plan in plans) for name in names}
    layers = [plan.first_layer for plan in plans if plan.first_layer is not None]
    flips = tuple(flip for plan in plans for flip in plan.flips)
    return PlanAgreement(**totals, first_layer=min(layers, default=None), flips=flips)


def _frame_flips(
    reference: VideoTrace, actual: VideoTrace, config: EarlyTomConfig, left: Sequence[tuple[int, int]],
    errors: ScoreErrors, video: int,
) -> tuple[int | None, list[Flip]]:
    """First merge layer with another plan, and the flips of frames there or, when there is none, of the marks."""
    if reference.stages and actual.stages:
        for k, (a, b) in enumerate(zip(reference.stages, actual.stages)):
            if sources(a.weights) != sources(b.weights):
                layer = config.merge_layers[k]
                place = Place(video, layer, errors.at(k))
                return layer, plan_flips(a.similarity, a.weights, b.similarity, b.weights, config, place)
    same_frames = len(left) == len(reference.weights) == len(actual.weights)
    if same_frames and torch.equal(reference.dynamic, actual.dynamic):
        return None, []
    similarity = reference.similarity
    if same_frames and similarity is not None and actual.similarity is not None:
        place = Place(video, None, errors.at(len(reference.stages)))
        return None, mask_flips(similarity, reference.dynamic, actual.similarity, actual.dynamic, config, place)
    # The other backend shows its answer only: it is excused when the reference's closest choice is a near-tie.
    if same_frames and similarity is not None:
        margins = [(smallest_cut_margin(similarity, config), errors.at(len(reference.stages)), _AFTER)]
    else:
        margins = [
            (closest_choice(stage.similarity, stage.weights, config), errors.at(k), k)
            for k, stage in enumerate(reference.stages)
        ]
    nothing = (math.inf, 0.0, _AFTER)
    margin, error, at = min(margins, key=lambda m: m[0] - m[1], default=nothing)
    differing = next((i for i in range(len(reference.weights)) if i not in dict(left)), 0)
    what = "other frames" if not same_frames else "another dynamic mask"
    where = Place(video, config.merge_layers[at] if at != _AFTER else None, error)
    return None, [where.flip("frames", differing, margin, f"{what}; the closest choice is meant")]


def _same_patches(
    mine: Tensor, theirs: Tensor, dynamic: bool, same_mark: bool, shapes: StaticShapes
) -> Iterator[tuple[int, int]]:
    """Indices (in mine, in theirs) of the same patch. A contextual token is the same only if all that it merges are."""
    if shapes.contextual and (dynamic or not same_mark):
        if not same_mark:
            return
        if not torch.equal(mine, theirs):
            mine, theirs = mine[: shapes.dominant], theirs[: shapes.dominant]
    where = {p: b for b, p in enumerate(theirs.tolist())}
    yield from ((a, where[p]) for a, p in enumerate(mine.tolist()) if p in where)


def _max_abs(a: Tensor, b: Tensor) -> float:
    """0 of nothing; NaN counts as infinite: it excuses nothing, because tolerances refuse it."""
    if not a.numel():
        return 0.0
    return float((a.double() - b.double()).abs().nan_to_num(nan=math.inf).max())
