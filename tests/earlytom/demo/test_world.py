"""The small world: clips follow from split, seed and index; what training must not see is never in it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlytom.demo.world import (
    COLOURS,
    MOTIONS,
    RADIUS,
    SHAPES,
    SPLITS,
    STEPS,
    WHOLE,
    Clip,
    Field,
    is_held_out,
    make_clip,
)
from earlytom.errors import ConfigError

CLIPS = st.builds(
    make_clip, st.sampled_from(SPLITS), st.integers(0, 99), st.integers(0, 10**6), frames=st.integers(4, 70)
)


def combinations(clip: Clip) -> set[tuple[str, str, str]]:
    """Every colour, shape and motion that is seen together, colours that things turn included."""
    seen = {(thing.colour, thing.shape, thing.motion) for thing in clip.things}
    return seen | {(thing.turn[1], thing.shape, thing.motion) for thing in clip.things if thing.turn}


def box(clip: Clip, thing: object, frame: int) -> Field:
    x, y = clip.centre(thing, frame)  # type: ignore[arg-type]
    radius = RADIUS[thing.size]  # type: ignore[attr-defined]
    return x - radius, y - radius, x + radius, y + radius  # type: ignore[return-value]


@settings(max_examples=150, deadline=None)
@given(CLIPS)
def test_any_clip_is_sound(clip: Clip) -> None:
    assert sum(thing.motion != "still" for thing in clip.things) <= 1
    assert len(clip.clock) == len(clip.ghost) == clip.frames
    assert clip.clock[0] == 0 and all(step in (0, 1) for step in map(lambda a, b: b - a, clip.clock, clip.clock[1:]))
    assert all(0 <= share < 1 for share in clip.ghost)
    assert clip.scenes[0].first == 0
    cuts = [scene.first for scene in clip.scenes]
    assert cuts == sorted(set(cuts)) and cuts[-1] < clip.frames
    assert 1 <= len(clip.things) <= 4 and clip.visible(0)
    assert [thing.first for thing in clip.things] == sorted(thing.first for thing in clip.things)
    for thing in clip.things:
        assert 0 <= thing.first < thing.last <= clip.frames
        assert not thing.brief or thing.last - thing.first <= 2
        assert thing.turn is None or (thing.first < thing.turn[0] < thing.last and thing.turn[1] != thing.colour)
    shapes = [thing.shape for thing in clip.things]
    colours = [colour for thing in clip.things for colour in (thing.colour, *(thing.turn or ())[1:])]
    assert len(set(shapes)) == len(shapes) and len(set(colours)) == len(colours)


@settings(max_examples=150, deadline=None)
@given(CLIPS)
def test_things_are_inside_and_apart(clip: Clip) -> None:
    for frame in range(clip.frames):
        boxes = [box(clip, thing, frame) for thing in clip.visible(frame)]
        for left, top, right, bottom in boxes:
            assert WHOLE[0] <= left and WHOLE[1] <= top and right <= WHOLE[2] and bottom <= WHOLE[3]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 188), st.integers(0, 188))
def test_things_stay_in_the_field(index: int, left: int, top: int) -> None:
    field = (left, top, left + 196, top + 196)
    clip = make_clip("train", 1, index, frames=8, field=field)
    for frame in range(8):
        for thing in clip.visible(frame):
            x0, y0, x1, y1 = box(clip, thing, frame)
            assert field[0] <= x0 and field[1] <= y0 and x1 <= field[2] and y1 <= field[3]


def test_held_out_combinations_are_seen_in_test_only() -> None:
    for index in range(300):
        for split in ("train", "validation"):
            assert not any(is_held_out(*seen) for seen in combinations(make_clip(split, 5, index)))
        things = make_clip("test", 5, index).things
        assert any(is_held_out(thing.colour, thing.shape, thing.motion) and thing.held_out for thing in things)


def test_each_colour_shape_and_motion_is_in_training_in_other_combinations() -> None:
    every = [(colour, shape, motion) for colour in COLOURS for shape in SHAPES for motion in MOTIONS]
    held_out = [seen for seen in every if is_held_out(*seen)]
    assert 0.08 < len(held_out) / len(every) < 0.17  # "about one in eight"
    for colour, shape, motion in held_out:
        shown = [seen for seen in every if not is_held_out(*seen)]
        assert any(seen[:2] == (colour, shape) for seen in shown)
        assert any(seen[1:] == (shape, motion) for seen in shown)
        assert any((seen[0], seen[2]) == (colour, motion) for seen in shown)


def test_splits_seeds_and_indices_share_no_clip() -> None:
    clips = [make_clip(split, seed, index) for split in SPLITS for seed in (0, 1, 12) for index in (0, 1, 2, 3, 21)]
    assert len(set(clips)) == len(clips)
    assert len({clip.noise_seed for clip in clips}) == len(clips)
    assert clips[0] == make_clip(SPLITS[0], 0, 0)


def test_motion_is_as_it_is_called() -> None:
    moved = 0
    for index in range(100):
        clip = make_clip("train", 2, index)
        for thing in clip.things:
            (x0, y0), (x1, y1) = clip.centre(thing, thing.first), clip.centre(thing, thing.last - 1)
            steps = clip.clock[thing.last - 1] - clip.clock[thing.first]
            way = ((x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0))
            assert way == (STEPS[thing.motion] if steps else (0, 0))
            moved += way != (0, 0)
    assert moved > 40


@pytest.mark.parametrize(("split", "frames", "said"), [("tests", 32, "train, valid"), ("test", 3, "at least 4")])
def test_refusals(split: str, frames: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_clip(split, 0, 0, frames=frames)
