"""From counts to budgets: what percentiles and bounds on FLOPs promise, on any counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.calibration.budgets import DEFAULT_PERCENTILE, budgets_within, percentile, percentile_budgets
from earlytom.calibration.result import flops_of
from earlytom.config import EarlyTomConfig, least_frames
from earlytom.errors import ConfigError, InputError
from earlytom.flops import tower_flops
from earlytom.vision.geometry import VisionGeometry

FRAMES, LAYERS = 32, (8, 21, 23)
SO400M = VisionGeometry()

ratios = st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.5])
falling = st.lists(st.integers(1, FRAMES), min_size=3, max_size=3).map(lambda n: tuple(sorted(n, reverse=True)))
many = st.lists(falling, min_size=1, max_size=30)
percents = st.floats(0, 100)


def settings(retain: float = 0.2) -> EarlyTomConfig:
    return EarlyTomConfig(retain=retain, frames=FRAMES, merge_layers=LAYERS)


def cost(budgets: tuple[int, ...]) -> int:
    """As FLOPs: every frame counts, in more layers the earlier it goes."""
    return sum(frames * layers for frames, layers in zip((FRAMES, *budgets), (9, 13, 2, 2)))


@given(many, percents, percents, ratios)
def test_budgets_of_a_percentile_are_budgets_and_rise_with_it(counts, one, other, retain):
    config = settings(retain)
    low, high = (percentile_budgets(counts, percent, config) for percent in sorted((one, other)))
    assert config.replace(frame_budgets=low).frame_budgets == low, "never growing, and enough for the retain ratio"
    assert all(a <= b for a, b in zip(low, high))
    assert percentile_budgets(counts[::-1], one, config) == percentile_budgets(counts, one, config)
    least = least_frames(FRAMES, retain)
    ends = [tuple(max(least, pick(layer)) for layer in zip(*counts)) for pick in (min, max)]
    assert [percentile_budgets(counts, percent, config) for percent in (0, 100)] == ends


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.sampled_from([0, 10, 12.5, 25, 50, 75, 90, 95, 100]))
def test_a_percentile_is_numpys(values, percent):
    assert float(percentile(values, percent)) == pytest.approx(float(np.percentile(values, percent)), abs=1e-9)


@given(many)
def test_the_default_has_the_least_distance_to_the_counts(counts):
    config = settings(0.02)  # 1 frame holds it: nothing is raised
    budgets = percentile_budgets(counts, DEFAULT_PERCENTILE, config)
    for budget, layer in zip(budgets, zip(*counts)):
        distances = [sum(abs(count - other) for count in layer) for other in range(1, FRAMES + 1)]
        assert distances[budget - 1] == min(distances)


@given(many, ratios, st.floats(0.2, 1.1))
def test_within_a_bound_are_the_largest_budgets_of_the_line(counts, retain, share):
    config = settings(retain)
    least = least_frames(FRAMES, retain)
    target = share * cost((FRAMES,) * 3)
    if cost((least,) * 3) > target:
        with pytest.raises(ConfigError, match="no budgets cost"):
            budgets_within(counts, config, cost, target)
        return
    found = budgets_within(counts, config, cost, target)
    assert cost(found.budgets) <= target
    config.replace(frame_budgets=found.budgets)  # valid
    if found.percentile is None:
        assert cost(percentile_budgets(counts, 0, config)) > target
        assert all(a <= b for a, b in zip(found.budgets, percentile_budgets(counts, 0, config)))
        return
    assert found.budgets == percentile_budgets(counts, found.percentile, config)
    if found.percentile < 100:
        assert cost(percentile_budgets(counts, min(100, found.percentile + 0.1), config)) > target


def test_a_bound_in_flops_of_the_real_tower():
    counts = [(20 + i % 8, 12 + i % 6, 8 + i % 3) for i in range(24)]
    config = settings()
    full = tower_flops(EarlyTomConfig(retain=1, merge_layers=(), frame_budgets=()), SO400M).total
    shares = []
    for share in (0.5, 0.6, 0.65, 1):
        found = budgets_within(counts, config, lambda budgets: flops_of(budgets, config, SO400M), share * full)
        shares.append(flops_of(found.budgets, config, SO400M) / full)
        assert shares[-1] <= share
    assert shares == sorted(shares) and found.percentile == 100 and found.budgets == (27, 17, 10)
    with pytest.raises(ConfigError, match=r"no budgets cost .* 7,7,7, the fewest .* first merge layer, 8"):
        budgets_within(counts, config, lambda budgets: flops_of(budgets, config, SO400M), 0.3 * full)


def test_frames_too_few_for_the_ratio_cost_what_they_are():
    """The released rules may leave fewer frames than hold the ratio; all their patches stay then."""
    config, geometry = settings(0.25), SO400M
    assert flops_of((20, 12, 8), config, geometry) == tower_flops(config, geometry).total
    few, fewer = (flops_of((4, 4, last), config, geometry) for last in (4, 3))
    assert fewer < few < flops_of((20, 12, 8), config, geometry)


@pytest.mark.parametrize("counts", [[(20, 12)], [(12, 20, 8)], [(33, 12, 8)], [(20, 12, 0)], [(20, 12, 8), (1,)]])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(InputError, match="do not fit"):
        percentile_budgets(counts, 50, settings())


def test_refusals():
    with pytest.raises(ConfigError, match="at least one clip"):
        percentile_budgets([], 50, settings())
    for percent in (-1, 101, float("nan")):
        with pytest.raises(ConfigError, match=r"must lie in 0\.\.100"):
            percentile_budgets([(1, 1, 1)], percent, settings())
