"""What happens in a drawn clip: coloured shapes that stay, move, turn another colour, or flash up for a moment.

A clip is a description, not pixels: draw.py paints it, questions.py asks about it. Everything follows from (split,
seed, index); the splits share no clip, and "test" has combinations of colour, shape and motion that "train" never has.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from random import Random

from ..errors import ConfigError

SIZE = 384  # pixels per side of a frame
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
MOTIONS = ("still", "left", "right", "up", "down")
STEPS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = ("plain", "gradient", "stripes", "drift", "clutter")
RADIUS = {"small": 19, "large": 38}  # pixels; a patch is 14, a pooled patch 28
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Thing:
    """A shape on the screen from frame `first` to before frame `last`.

    x, y: its centre in pixels at `first`; pace: pixels it moves per frame; turn: (frame, colour) of a change of colour;
    brief: it flashes up for one or two frames.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    motion: str
    pace: float
    first: int
    last: int
    turn: tuple[int, str] | None = None
    brief: bool = False

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        return is_held_out(self.colour, self.shape, self.motion)


@dataclass(frozen=True)
class Scene:
    """What is behind the things from frame `first` on: one of BACKGROUNDS, its look from `seed`."""

    first: int
    background: str
    seed: int


@dataclass(frozen=True)
class Clip:
    """A video of `frames` frames.

    things: by `first`; scenes: each but the first begins with a camera cut; clock: how far the motion has come at each
    frame, in frames, constant in a still stretch; ghost: share of the next frame that shows through each frame, as
    after a change of frame rate; noise: standard deviation in grey levels. noise_seed: of the noise.
    """

    frames: int
    things: tuple[Thing, ...]
    scenes: tuple[Scene, ...]
    clock: tuple[float, ...]
    ghost: tuple[float, ...]
    noise: float
    noise_seed: int

    def centre(self, thing: Thing, frame: int) -> tuple[float, float]:
        """Pixels (x, y) of the thing's centre at a frame."""
        gone = (self.clock[frame] - self.clock[thing.first]) * thing.pace
        dx, dy = STEPS[thing.motion]
        return thing.x + dx * gone, thing.y + dy * gone

    def colour(self, thing: Thing, frame: int) -> str:
        return thing.turn[1] if thing.turn is not None and frame >= thing.turn[0] else thing.colour

    def visible(self, frame: int) -> list[Thing]:
        return [thing for thing in self.things if thing.first <= frame < thing.last]

    def scene(self, frame: int) -> Scene:
        return [scene for scene in self.scenes if scene.first <= frame][-1]


Field = tuple[int, int, int, int]  # left, top, right, bottom in pixels: where things may be
WHOLE: Field = (0, 0, SIZE, SIZE)


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination never occurs in "train" and "validation": about one in eight."""
    return zlib.crc32(f"{colour} {shape} {motion}".encode()) % 8 == 0


def make_clip(split: str, seed: int, index: int, *, frames: int = 32, field: Field = WHOLE) -> Clip:
    """Clip `index` of a split. frames: at least 4. field: where its things are. Raises ConfigError.

    In "test" at least one thing is a combination that was held out.
    """
    if split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}, the splits are {', '.join(SPLITS)}")
    if frames < 4:
        raise ConfigError(f"a drawn clip of {frames} frames is too short for anything to happen: at least 4 are needed")
    rng = Random(f"earlytom demo {split} {seed} {index}")
    while True:  # a crowded plan is drawn again
        plan = _parade(rng, frames) if rng.random() < 0.4 else _stage(rng, frames)
        things = _place(rng, plan, split, frames, field)
        if things is not None:
            break
    cuts = sorted({thing.first for thing in things if thing.first > 0} if len(plan.cuts) > 1 else plan.cuts)
    scenes = [Scene(first, rng.choice(BACKGROUNDS), rng.randrange(2**31)) for first in [0, *cuts]]
    return Clip(
        frames,
        tuple(sorted(things, key=lambda thing: (thing.first, thing.x))),
        tuple(scenes),
        _clock(rng, frames),
        _ghost(rng, frames),
        rng.choice([0.0, 3.0, 6.0, 10.0]),
        rng.randrange(2**31),
    )


@dataclass(frozen=True)
class _Plan:
    """Spans of things (first, last, brief) and the frames of camera cuts."""

    spans: list[tuple[int, int, bool]]
    cuts: list[int]


def _stage(rng: Random, frames: int) -> _Plan:
    """One to four things all along; now and then one flashes up besides, or the camera cuts."""
    spans = [(0, frames, False)] * rng.choice([1, 2, 2, 3, 3, 4, 4, 4])
    if rng.random() < 0.5:
        length = rng.choice([1, 2]) if frames >= 16 else 1
        first = rng.randrange(1, frames - length)
        spans = [*spans[:3], (first, first + length, True)]
    cuts = [rng.randrange(frames // 4, frames - frames // 4)] if rng.random() < 0.3 else []
    return _Plan(spans, cuts)


def _parade(rng: Random, frames: int) -> _Plan:
    """Two to four things, one after another: each vanishes as the next one comes, or stays until the end."""
    count = min(rng.choice([2, 3, 4, 4]), max(2, frames // 4))
    least = frames // (count + 1)
    slack = frames - least * count
    marks = sorted(rng.randint(0, slack) for _ in range(count - 1))
    starts = [0] + [least * (i + 1) + mark for i, mark in enumerate(marks)]
    stays = rng.random() < 0.3
    ends = [frames if stays else end for end in [*starts[1:], frames]]
    with_cuts = not stays and rng.random() < 0.5
    return _Plan([(a, b, False) for a, b in zip(starts, ends)], starts[1:] if with_cuts else [])


def _place(rng: Random, plan: _Plan, split: str, frames: int, field: Field) -> list[Thing] | None:
    """Things for the spans, none over another, no colour and no shape twice, at most one of them moving; None when they
    do not fit."""
    colours, shapes = rng.sample(COLOURS, len(plan.spans) + 1), rng.sample(SHAPES, len(plan.spans))
    hero = rng.randrange(len(plan.spans)) if split == "test" else -1
    mover = rng.randrange(len(plan.spans))
    things: list[Thing] = []
    for i, (first, last, brief) in enumerate(plan.spans):
        motion = "still" if i != mover or brief or last - first < 3 else rng.choice(MOTIONS)
        if i == hero:  # its colour is free to choose: the combination must be one that was held out
            free = [c for c in COLOURS if c not in colours[:i] + colours[i + 1 :] and is_held_out(c, shapes[i], motion)]
            if not free:
                return None
            colours[i] = rng.choice(free)
        elif split != "test" and is_held_out(colours[i], shapes[i], motion):
            return None
        thing = Thing(
            shapes[i], colours[i], rng.choice(["small", "small", "large"]), 0, 0, motion, 0, first, last, None, brief
        )
        others = [t for t in things if t.first < last and first < t.last]
        for _ in range(20):
            laid = _lay(rng, thing, field)
            if not any(_meet(laid, other) for other in others):
                break
        else:
            return None
        things.append(laid)
    if rng.random() < 0.3:
        still = [i for i, t in enumerate(things) if not t.brief and t.last - t.first >= 4]
        if still:
            thing = things[i := rng.choice(still)]
            frame = rng.randrange(thing.first + 2, thing.last - 1)
            if split == "test" or not is_held_out(colours[-1], thing.shape, thing.motion):
                things[i] = replace(thing, turn=(frame, colours[-1]))
    return things


def _lay(rng: Random, thing: Thing, field: Field) -> Thing:
    """The thing somewhere in the field, with a path of a quarter to a half of the field if it moves."""
    radius, (left, top, right, bottom) = RADIUS[thing.size] + 2, field
    width, height = right - left - 2 * radius, bottom - top - 2 * radius
    dx, dy = STEPS[thing.motion]
    reach = rng.uniform(0.45, 0.9) * (width if dx else height) if dx or dy else 0
    x0, y0 = left + radius + max(0, -dx) * reach, top + radius + max(0, -dy) * reach
    x, y = x0 + rng.uniform(0, width - abs(dx) * reach), y0 + rng.uniform(0, height - abs(dy) * reach)
    return replace(thing, x=x, y=y, pace=reach / max(1, thing.last - thing.first - 1))


def _meet(one: Thing, other: Thing) -> bool:
    """Whether the boxes that two things sweep overlap."""

    def box(thing: Thing) -> tuple[float, float, float, float]:
        dx, dy = STEPS[thing.motion]
        reach, radius = thing.pace * (thing.last - thing.first), RADIUS[thing.size] + 2
        xs, ys = sorted([thing.x, thing.x + dx * reach]), sorted([thing.y, thing.y + dy * reach])
        return xs[0] - radius, ys[0] - radius, xs[1] + radius, ys[1] + radius

    a, b = box(one), box(other)
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _clock(rng: Random, frames: int) -> tuple[float, ...]:
    """Frame -> how far the motion has come; one clip in four has a still stretch of a fifth of its frames."""
    pause = rng.randrange(1, frames) if rng.random() < 0.25 else frames
    length = max(1, frames // 5)
    return tuple(float(min(t, pause) + max(0, t - pause - length)) for t in range(frames))


def _ghost(rng: Random, frames: int) -> tuple[float, ...]:
    some = rng.random() < 0.3
    return tuple(rng.uniform(0.2, 0.8) if some and rng.random() < 0.3 else 0.0 for _ in range(frames))
