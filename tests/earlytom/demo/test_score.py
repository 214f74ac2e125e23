"""Intervals: published values, the formula for pairs, and how often a true difference is caught."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.demo.score import Z95, difference, share, wilson
from earlytom.errors import InputError

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),  # Newcombe
        (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilson_has_the_published_values(right: int, total: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_holds_the_share_and_mirrors(found: tuple[int, int]) -> None:
    right, total = found
    low, high = wilson(right, total)
    assert 0 <= low <= right / total <= high <= 1 and low < high
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low))


def test_a_share_counts() -> None:
    found = share([True, False, True, True])
    assert (found.right, found.total, found.value) == (3, 4, 0.75)
    assert (found.low, found.high) == wilson(3, 4)


@given(PAIRS)
def test_alone_on_its_clip_each_question_gives_agresti_and_mins_interval(pairs: list[tuple[bool, bool, int]]) -> None:
    one, other, _ = zip(*pairs)
    b, c, n = sum(x > y for x, y in zip(one, other)), sum(x < y for x, y in zip(one, other)), len(pairs)
    middle = (b - c) / (n + 2)
    spread = Z95 * math.sqrt(b + c + 1 - (b - c) ** 2 / (n + 2)) / (n + 2)
    found = difference(one, other, range(n))
    assert (found.gained, found.lost, found.total) == (b, c, n) and found.value == (b - c) / n
    assert found.low == pytest.approx(max(-1, middle - spread)) and found.high == pytest.approx(min(1, middle + spread))


@given(PAIRS)
def test_a_difference_holds_its_value_and_turns_round(pairs: list[tuple[bool, bool, int]]) -> None:
    one, other, clips = zip(*pairs)
    found, turned = difference(one, other, clips), difference(other, one, clips)
    assert -1 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    assert (turned.low, turned.value, turned.high) == pytest.approx((-found.high, -found.value, -found.low))
    assert found.clear == (found.low > 0 or found.high < 0)
    same = difference(one, one, clips)
    assert (same.gained, same.lost, same.value) == (0, 0, 0) and not same.clear


@given(PAIRS)
def test_what_a_second_question_on_the_same_clip_repeats_counts_for_less(pairs: list[tuple[bool, bool, int]]) -> None:
    one, other, _ = (x * 2 for x in zip(*pairs))
    shared = difference(one, other, [*range(len(pairs))] * 2)
    apart = difference(one, other, range(2 * len(pairs)))
    assert shared.value == apart.value and shared.high - shared.low >= apart.high - apart.low - 1e-12


def test_the_interval_holds_a_true_difference_as_often_as_it_says() -> None:
    """40 clips of 3 questions that go wrong together, true difference 10 points: 95 % of the intervals hold it."""
    rng = Random(1)
    held = narrow = 0
    for _ in range(500):
        one, other, clips = [], [], []
        for clip in range(40):
            hard = rng.random() < 0.5
            for _ in range(3):
                one.append(not hard or rng.random() < 0.4)
                other.append(not hard or rng.random() < 0.2)
                clips.append(clip)
        found = difference(one, other, clips)
        held += found.low <= 0.10 <= found.high
        apart = difference(one, other, range(120))
        narrow += found.high - found.low <= apart.high - apart.low
    assert 0.93 <= held / 500 <= 0.98 and narrow < 500


@pytest.mark.parametrize("wrong", [([], [], []), ([True], [True, False], [0, 1]), ([True], [True], [0, 1])])
def test_refusals(wrong: tuple[list[bool], list[bool], list[int]]) -> None:
    with pytest.raises(InputError):
        difference(*wrong)
    with pytest.raises(InputError):
        share([])
    with pytest.raises(InputError):
        wilson(3, 2)
