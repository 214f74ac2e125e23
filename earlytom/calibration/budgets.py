"""From the frames that the released rules leave of many clips to frame budgets: a percentile, or a bound on FLOPs.

Pure functions on whole numbers, in exact arithmetic: the same counts give the same budgets everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..config import EarlyTomConfig, least_frames
from ..errors import ConfigError, InputError

DEFAULT_PERCENTILE = 50.0
"""The median has the least sum of distances to the counts: of frames removed beyond the rules, and of frames that come
back although the rules remove them. It is also what `earlytom-eval` measures as "calibrated"."""

STEPS = 1000  # percentiles that a bound on FLOPs chooses from: tenths of one
SHARES = 100  # below the lowest of them: hundredths of its budgets

Counts = Sequence[Sequence[int]]  # of each clip, the frames left after each merge layer
Cost = Callable[[tuple[int, ...]], int]  # FLOPs of frame budgets; it must not fall when one of them rises


@dataclass(frozen=True)
class Proposal:
    """Frame budgets and where they lie among the clips: percentile, or None for budgets below every clip's counts."""

    budgets: tuple[int, ...]
    percentile: float | None


def check_counts(counts: Counts, config: EarlyTomConfig) -> None:
    """Raise InputError unless every clip has a count for each merge layer, at least 1, that never grows from T on."""
    for clip in counts:
        whole = (config.frames, *clip)
        if len(clip) != len(config.merge_layers) or min(whole) < 1 or any(b > a for a, b in zip(whole, whole[1:])):
            raise InputError(
                f"the counts {list(clip)} do not fit: {len(config.merge_layers)} are needed, one for each merge layer, "
                f"that begin at no more than {config.frames} frames, never grow and leave at least 1"
            )


def percentile(values: Sequence[int], percent: float) -> Fraction:
    """The value below which `percent` of 100 of them lie, interpolated between neighbours as NumPy does by default."""
    ordered = sorted(values)
    at = Fraction(percent) / 100 * (len(ordered) - 1)
    low = min(math.floor(at), len(ordered) - 2) if len(ordered) > 1 else 0
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def percentile_budgets(counts: Counts, percent: float, config: EarlyTomConfig) -> tuple[int, ...]:
    """Budgets that hold what the rules leave of `percent` of 100 clips, at each merge layer by itself.

    Rounded to the nearest, half to even, and no lower than what holds the retain ratio. They never grow from layer to
    layer, because no clip's counts do. Raises ConfigError without a clip or for a percentile outside 0..100,
    InputError for counts that cannot be.
    """
    if not 0 <= percent <= 100:
        raise ConfigError(f"the percentile is {percent:g}, it must lie in 0..100")
    if not counts:
        raise ConfigError("calibrated budgets need at least one clip to calibrate on")
    check_counts(counts, config)
    least = least_frames(config.frames, config.retain)
    return tuple(max(least, round(percentile(layer, percent))) for layer in zip(*counts))


def check_reachable(config: EarlyTomConfig, cost: Cost, target: float) -> None:
    """Raise ConfigError when even the fewest frames that hold the retain ratio cost more than `target` FLOPs."""
    fewest = (least_frames(config.frames, config.retain),) * len(config.merge_layers)
    if (smallest := cost(fewest)) > target:
        raise ConfigError(
            f"no budgets cost {target:.4g} FLOPs or less: {','.join(map(str, fewest))}, the fewest frames that hold "
            f"retain {config.retain:g}, cost {smallest:.4g}, because all frames pass the layers up to the first merge "
            f"layer, {config.merge_layers[0]}"
        )


def budgets_within(counts: Counts, config: EarlyTomConfig, cost: Cost, target: float) -> Proposal:
    """The largest budgets whose `cost` is at most `target`, along one line of ever larger budgets.

    The line is that of the percentiles, in tenths: budgets that all hold equally many clips. At most they are those of
    percentile 100, which leave no clip less than the rules do. Below percentile 0 its budgets are scaled down by
    hundredths, to what holds the retain ratio. Raises ConfigError as check_reachable and percentile_budgets.
    """
    lowest = percentile_budgets(counts, 0, config)
    least = least_frames(config.frames, config.retain)

    def member(i: int) -> Proposal:
        if i < SHARES:
            return Proposal(tuple(max(least, round(Fraction(b * i, SHARES))) for b in lowest), None)
        percent = 100 * (i - SHARES) / STEPS
        return Proposal(percentile_budgets(counts, percent, config), percent)

    check_reachable(config, cost, target)
    below, above = 0, SHARES + STEPS + 1  # the first fits, the second does not exist or does not fit
    while above - below > 1:
        middle = (below + above) // 2
        if cost(member(middle).budgets) <= target:
            below = middle
        else:
            above = middle
    return member(below)
