"""How far budgets are from the released rules: by the mixes of source frames that both leave."""

from __future__ import annotations

from earlytom.calibration.agreement import Agreement, Difference, Merged, difference, summarise

RELEASED = Merged((4, 3), (((0, 1.0),), ((1, 0.6), (2, 0.4)), ((4, 1.0),)))


def test_the_same_plan_is_equal():
    noise = Merged((4, 3), (((0, 1.0),), ((1, 0.60001), (2, 0.39999)), ((4, 1.0),)))
    assert difference(RELEASED, RELEASED) == difference(noise, RELEASED) == Difference(True, 3, 0, 0)


def test_the_same_frames_by_other_steps_are_no_equal_plan():
    assert difference(Merged((5, 3), RELEASED.mix), RELEASED) == Difference(False, 3, 0, 0)


def test_a_frame_counts_by_its_mix():
    more = Merged((5, 4), (((0, 1.0),), ((1, 1.0),), ((2, 1.0),), ((4, 1.0),)))  # a pair that came back
    assert difference(more, RELEASED) == Difference(False, 4, 2, 1)
    fewer = Merged((4, 2), (((0, 0.5), (1, 0.3), (2, 0.2)), ((4, 1.0),)))
    assert difference(fewer, RELEASED) == Difference(False, 2, 1, 2)
    reweighted = Merged((4, 3), (((0, 1.0),), ((1, 0.5), (2, 0.5)), ((4, 1.0),)))
    assert difference(reweighted, RELEASED) == Difference(False, 3, 1, 1)
    shared = Merged((4, 3), (((0, 1.0),), ((1, 0.6), (3, 0.4)), ((4, 1.0),)))
    assert difference(shared, RELEASED) == Difference(False, 3, 1, 1)


def test_means_are_over_the_clips_that_differ():
    others = [Difference(False, 4, 2, 1), Difference(False, 3, 0, 0), Difference(False, 2, 1, 2)]
    found = [Difference(True, 3, 0, 0), *others]
    assert summarise(found) == Agreement(clips=4, equal=1, same=2, differing=1.0, missing=1.0, most=2)
    assert summarise(found[:1]) == Agreement(clips=1, equal=1, same=1, differing=0.0, missing=0.0, most=0)
