"""How sure an accuracy is, and a difference of two on the same questions. Plain arithmetic, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import InputError

Z95 = 1.959963984540054  # of the normal distribution: 95 % lie within


@dataclass(frozen=True)
class Share:
    """right of total questions, value = right / total; low..high: 95 % interval (Wilson's)."""

    right: int
    total: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One row's accuracy less another's on the same questions: value; low..high: 95 % interval; see `difference`.

    gained, lost: questions that only the one, only the other has right.
    """

    total: int
    gained: int
    lost: int
    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return not self.low <= 0 <= self.high


def share(right: Iterable[bool]) -> Share:
    """The share of right answers. Wilson's interval takes questions as independent: use it where few share a clip."""
    answers = list(right)
    if not answers:
        raise InputError("there is no accuracy of no questions")
    low, high = wilson(sum(answers), len(answers))
    return Share(sum(answers), len(answers), sum(answers) / len(answers), low, high)


def wilson(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share, without continuity correction. Source: Newcombe 1998, method 3."""
    if not 0 <= right <= total or total < 1:
        raise InputError(f"{right} right of {total} is no share")
    p, n = right / total, total
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return (0.0 if right == 0 else low), (1.0 if right == total else high)


def difference(one: Sequence[bool], other: Sequence[bool], clips: Sequence[int], z: float = Z95) -> Difference:
    """Accuracy of `one` less that of `other`, both on the same questions; clips: which clip each question is about.

    Questions about one clip go wrong together, so the variance is that between clips: with x_q in {-1, 0, 1} and D the
    mean, it is sum over clips of (sum over its questions of (x_q - D))^2. To this, half a question is added to each
    cell of right and wrong. Where no two questions share a clip it is Agresti and Min's adjusted Wald interval for
    matched pairs (Statistics in Medicine 24, 2005), which keeps its level in small samples and, unlike a bootstrap, has
    a width when no answer differs. Deterministic.
    """
    if not len(one) == len(other) == len(clips) or not len(clips):
        raise InputError(f"{len(one)}, {len(other)} answers and {len(clips)} clips do not go together")
    x = [bool(a) - bool(b) for a, b in zip(one, other)]
    total = len(x)
    middle = sum(x) / (total + 2)  # the half questions are two in all, and their sum is 0
    by_clip: dict[int, float] = {}
    for clip, value in zip(clips, x):
        by_clip[clip] = by_clip.get(clip, 0.0) + value - middle
    added = 0.5 * (1 - middle) ** 2 + 0.5 * (1 + middle) ** 2 + middle**2
    spread = z * math.sqrt(sum(deviation**2 for deviation in by_clip.values()) + added) / (total + 2)
    return Difference(
        total, x.count(1), x.count(-1), sum(x) / total, max(-1.0, middle - spread), min(1.0, middle + spread)
    )
