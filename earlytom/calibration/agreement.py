"""How far what fixed budgets leave of a clip is from what the released rules leave. Pure; see merging.py for the tower.

Attention never crosses frames, so a frame left with the same mix of source frames is the same frame, whatever happened
to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 1e-4
"""Weights of a mix that count as equal: far above what float32 differs by when layers run on other batches of frames,
far below what another neighbour makes of a weight."""

Mix = tuple[tuple[tuple[int, float], ...], ...]
"""For each frame left, in order: (source frame, its weight) of all source frames that are in it."""


@dataclass(frozen=True)
class Merged:
    """What merging left of one clip: counts, frames after each merge layer; mix, of the frames left after the last."""

    counts: tuple[int, ...]
    mix: Mix


@dataclass(frozen=True)
class Difference:
    """Fixed budgets against the released rules on one clip.

    equal: every merge layer left as many frames, so that every plan is the released one; frames: left by the budgets;
    differing: those of them with a mix that the rules do not leave; missing: frames left by the rules with a mix that
    the budgets do not leave.
    """

    equal: bool
    frames: int
    differing: int
    missing: int


@dataclass(frozen=True)
class Agreement:
    """Over clips. equal: with the released plan at every merge layer; same: with the same frames in the end, reached
    in whatever steps; differing, missing: mean over the clips whose plans are not equal, 0 without any; most: the
    largest `differing`."""

    clips: int
    equal: int
    same: int
    differing: float
    missing: float
    most: int


def difference(fixed: Merged, released: Merged) -> Difference:
    differing, missing = _without_match(fixed.mix, released.mix), _without_match(released.mix, fixed.mix)
    equal = fixed.counts == released.counts and not differing and not missing
    return Difference(equal, len(fixed.mix), differing, missing)


def summarise(differences: Sequence[Difference]) -> Agreement:
    others = [found for found in differences if not found.equal]
    number = max(1, len(others))
    return Agreement(
        clips=len(differences),
        equal=len(differences) - len(others),
        same=sum(not (found.differing or found.missing) for found in differences),
        differing=sum(found.differing for found in others) / number,
        missing=sum(found.missing for found in others) / number,
        most=max((found.differing for found in others), default=0),
    )


def _without_match(mine: Mix, theirs: Mix) -> int:
    """Rows of `mine` that no row of `theirs` is the same mix as."""
    known = [dict(row) for row in theirs]
    return sum(not any(_same(dict(row), other) for other in known) for row in mine)


def _same(a: dict[int, float], b: dict[int, float]) -> bool:
    return all(abs(a.get(frame, 0.0) - b.get(frame, 0.0)) <= TOLERANCE for frame in a.keys() | b.keys())
