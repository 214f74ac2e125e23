"""Drawn clips: the same every time, windows that are parts of the whole, things where and as they are said to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from earlytom.demo.draw import RGB, draw
from earlytom.demo.world import BACKGROUNDS, COLOURS, RADIUS, SHAPES, Clip, Scene, Thing, make_clip


def test_it_is_drawn_the_same_twice() -> None:
    clip = make_clip("train", 0, 3, frames=6)
    frames = draw(clip)
    assert frames.dtype == np.uint8 and frames.shape == (6, 384, 384, 3)
    np.testing.assert_array_equal(frames, draw(make_clip("train", 0, 3, frames=6)))
    np.testing.assert_array_equal(frames[[4, 1]], draw(clip, [4, 1]))


@pytest.mark.parametrize("index", range(8))
def test_a_window_is_a_part_of_the_whole(index: int) -> None:
    clip = make_clip("train", 1, index, frames=8)
    whole = draw(clip, [2, 6]).astype(int)
    for left, top, right, bottom in ((0, 0, 196, 196), (98, 140, 294, 336), (188, 188, 384, 384)):
        part = draw(clip, [2, 6], (left, top, right, bottom)).astype(int)
        assert part.shape == (2, bottom - top, right - left, 3)
        difference = np.abs(part - whole[:, top:bottom, left:right])
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # float32 sums: a value on a half may turn


def still(shape: str, colour: str, **changes: object) -> Clip:
    thing = Thing(shape, colour, "large", 100.0, 250.0, "still", 0.0, 0, 4)
    clip = Clip(4, (replace(thing, **changes),), (Scene(0, "plain", 1),), (0.0, 1.0, 2.0, 3.0), (0.0,) * 4, 0.0, 5)  # type: ignore[arg-type]
    return clip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_colour_where_it_is_and_none_outside(shape: str) -> None:
    for colour in COLOURS:
        frame = draw(still(shape, colour), [0])[0].astype(int)
        empty = draw(replace(still(shape, colour), things=()), [0])[0].astype(int)
        radius = RADIUS["large"]
        painted = (frame == RGB[colour]).all(-1)
        changed = (frame != empty).any(-1)
        ys, xs = changed.nonzero()
        assert 100 - radius - 1 <= xs.min() < xs.max() <= 100 + radius + 1
        assert 250 - radius - 1 <= ys.min() < ys.max() <= 250 + radius + 1
        assert xs.max() - xs.min() > 1.4 * radius and painted.sum() > 0.15 * (2 * radius) ** 2
        assert painted[250, 100] == (shape != "ring")


def test_shapes_differ() -> None:
    pictures = [draw(still(shape, "red"), [0]).tobytes() for shape in SHAPES]
    assert len(set(pictures)) == len(SHAPES)


def test_turning_moving_vanishing_and_ghosts_are_seen() -> None:
    red, blue = np.array(RGB["red"]), np.array(RGB["blue"])
    turned = draw(still("square", "red", turn=(2, "blue")))
    assert (turned[1, 250, 100] == red).all() and (turned[2, 250, 100] == blue).all()
    moved = draw(still("square", "red", motion="right", pace=40.0))
    assert (moved[0, 250, 100] == red).all() and (moved[3, 250, 220] == red).all() and (moved[3, 250, 100] != red).any()
    gone = still("square", "red", last=2)
    assert (draw(gone)[1, 250, 100] == red).all() and (draw(gone)[2, 250, 100] != red).any()
    ghosted = draw(replace(gone, ghost=(0.0, 0.5, 0.0, 0.0)))[1, 250, 100].astype(int)
    behind = draw(gone)[2, 250, 100].astype(int)
    assert np.abs(ghosted - (red + behind) / 2).max() <= 1


def test_noise_changes_from_frame_to_frame_and_has_its_strength() -> None:
    clip = replace(still("square", "red"), things=(), noise=6.0)
    noise = draw(clip).astype(float) - draw(replace(clip, noise=0.0)).astype(float)
    assert 5.5 < noise.std() < 6.5 and abs(noise.mean()) < 0.2
    assert not np.array_equal(noise[0], noise[1])


def test_backgrounds_are_greys_that_cuts_change() -> None:
    for background in BACKGROUNDS:
        scenes = (Scene(0, background, 1), Scene(2, background, 2))
        frames = draw(replace(still("square", "red"), things=(), scenes=scenes)).astype(int)
        assert (frames.max(-1) - frames.min(-1)).max() <= 30  # no colour of a thing
        assert np.abs(frames[1] - frames[2]).mean() > 2
        assert np.array_equal(frames[0], frames[1]) == (background != "drift")
