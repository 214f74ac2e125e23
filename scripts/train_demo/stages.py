"""The recipe: what each stage trains, on what, for how long. Only full tokens are ever seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from earlytom.demo.world import SIZE

from .language import FIRST, THEN, WHERE, WHOLE, Lesson, Packer, answer_loss, describe, make_lessons
from .student import Student
from .tower import GRID, WINDOW, Batch, loss_of, make_batch, see

Losses = tuple[Tensor, dict[str, float]]
Lessons = tuple[list[Lesson], Tensor]  # and what is seen of each: pixels uint8 [B, T, H, W, 3], or descriptions


@dataclass(frozen=True)
class Stage:
    """trains: parts of the student (student.py); draw: what step number `step` is about, from (step, size), in any
    process; loss: of what was drawn; size: clips or frames of a step.

    The learning rate rises for `warmup` steps to `rate` and falls as a cosine to the share `least` of it. muon: by Muon
    for the matrices of layers, AdamW for the rest; without, AdamW for all.
    """

    name: str
    trains: tuple[str, ...]
    steps: int
    rate: float
    size: int
    draw: Callable[[int, int], Any]
    loss: Callable[[Student, Packer, Any], Losses]
    warmup: int = 200
    muon: bool = False
    least: float = 0.05


SEED = 0


def draw_windows(step: int, size: int) -> Batch:
    return make_batch(SEED, step, size, WINDOW)


def draw_frames(step: int, size: int) -> Batch:
    return make_batch(SEED + 100, step, size, GRID)


def name_things(student: Student, packer: Packer, batch: Batch) -> Losses:
    batch = batch.to(student.device)
    return loss_of(see(student.vision, batch.frames, batch.corner), student.heads, batch)


def draw_descriptions(step: int, size: int) -> Lessons:
    """What a perfect tower would say: no pixel is drawn, patches are coarse.

    A thing that is alone is learned from first, then two; then as many as clips have, over more frames.
    """
    many = ((1, 1),) if step < 300 else ((1, 2), (2, 2)) if step < 600 else MANY
    frames = Random(step + 1).choice((4,) if step < 300 else (4, 6) if step < 600 else (4, 6, 8, 12))
    return _described(step, _of_many(many, SEED, step, size, frames, 8, FIRST if step < 600 else THEN))


def draw_several(step: int, size: int) -> Lessons:
    """Short clips of two things and more, few questions about each: whose place it is, and whose way."""
    return _described(step, _of_many(
        ((2, 2), (3, 4), (4, 4)), SEED + 400, step, size, Random(step).choice((4, 4, 6)), 8, WHERE, 4
    ))


def draw_descriptions_again(step: int, size: int) -> Lessons:
    """Of frames of several sizes, and of clips of one thing as well as of four: what is found in a clip must not hang
    on how many tokens a frame has."""
    side, several = Random(step).choice(
        [(8, (4, 6, 8, 12, 16, 32)), (10, (4, 6, 8, 12)), (12, (4, 6, 8)), (14, (4, 5, 6))]
    )
    return _described(step, _of_many(MANY, SEED + 600, step, size, Random(step + 1).choice(several), side))


def draw_whole_descriptions(step: int, size: int) -> Lessons:
    """Clips as long and as fine as they will be: of 32 whole frames, every second time two shorter or coarser ones."""
    side, frames, count = (GRID, 32, 1) if step % 2 else Random(step).choice([(GRID, 16, 2), (20, 32, 2)])
    return _described(
        step, make_lessons(SEED + 800, step, size * count, frames, side, 32 // count, SIZE // side, 4, WHOLE)
    )


MANY = ((1, 8), (2, 4), (3, 4), (4, 2))  # most things in a clip, and which part of a step such clips are


def _of_many(
    many: tuple[tuple[int, int], ...], seed: int, step: int, size: int, frames: int, side: int,
    weights: Mapping[str, float] = WHERE, asked: int = 10,
) -> list[Lesson]:
    return [
        lesson
        for most, part in many
        for lesson in make_lessons(
            seed + most, step, max(1, size // part), frames, side, asked, SIZE // side, most, weights
        )
    ]


def _described(step: int, lessons: list[Lesson]) -> Lessons:
    described = torch.stack([lesson.labels() for lesson in lessons])
    return lessons, described + 0.05 * torch.randn(described.shape, generator=torch.Generator().manual_seed(step))


def read_descriptions(student: Student, packer: Packer, drawn: Lessons, stretch: int = 1) -> Losses:
    lessons, described = drawn
    visual = student.sequence(student.describer(described.to(student.device)))
    return answer_loss(student.language, packer, lessons, visual, stretch)


def read_from_far(student: Student, packer: Packer, drawn: Lessons) -> Losses:
    """With positions further apart, as if frames had more patches: what is far away is not what was far away here."""
    return read_descriptions(student, packer, drawn, _stretch(drawn[0], [1, 1, 2, 4, 8]))


def draw_truth(step: int, size: int) -> tuple[Batch, Tensor]:
    """Windows, every fourth time fewer whole frames, and what a perfect tower would say of them."""
    side, count = (GRID, max(1, size // 5)) if step % 4 == 3 else (WINDOW, size)
    batch = make_batch(SEED + 200, step, count, side)
    labels = zip(*(x.numpy() for x in (batch.thing, batch.offset, batch.counts, batch.near)))
    described = [describe(of, corner, side) for of, corner in zip(labels, batch.corner.tolist())]
    return batch, torch.from_numpy(np.stack(described))


def meet(student: Student, packer: Packer, drawn: tuple[Batch, Tensor]) -> Losses:
    """Tower and projector learn to say together what the describer says of the truth, so that the language model, which
    reads the describer, can read them. Half of the loss is about patches that show a thing.

    What the tower was asked until now is asked still: without, its last layer looked at things no more.
    """
    batch, described = drawn[0].to(student.device), drawn[1].to(student.device)
    seen = see(student.vision, batch.frames, batch.corner)
    said = student.vision.project(seen[-1])
    with torch.no_grad():
        meant = student.describer(described)
    wrong = (said - meant).square().mean(-1) / meant.var()
    there = batch.thing[..., 0] > 0
    things, rest = (wrong[where].mean() if where.any() else wrong.sum() * 0 for where in (there, ~there))
    named, log = loss_of(seen, student.heads, batch)
    return things + rest + named, {"unexplained": things.item(), "elsewhere": rest.item(), "named": log["named"]}


def draw_short_clips(step: int, size: int) -> Lessons:
    """Short clips in windows, as the tower first saw them; every fourth time fewer clips of some 2000 tokens, of many
    frames or of whole ones."""
    rng = Random(step)
    if step % 4 < 3:
        return _filmed(make_lessons(SEED + 300, step, size, rng.choice([4, 5, 6, 8]), WINDOW, 12))
    side, frames = rng.choice([(14, 32), (20, 16), (27, 8), (27, 10)])
    return _filmed(make_lessons(SEED + 300, step, max(1, size // 4), frames, side, 24))


def draw_clips(step: int, size: int) -> Lessons:
    """Whole frames: a clip of 32 of them, then two of 16."""
    count = 1 + step % 2
    return _filmed(make_lessons(SEED + 500, step, size * count, 32 // count, GRID, 24))


def draw_more_clips(step: int, size: int) -> Lessons:
    """Clips of 32 whole frames, asked mostly for what their length makes harder."""
    return _filmed(make_lessons(SEED + 900, step, size, 32, GRID, 24, weights=WHOLE))


def _filmed(lessons: list[Lesson]) -> Lessons:
    return lessons, torch.stack([lesson.pixels() for lesson in lessons])


def _corners(lessons: list[Lesson]) -> Tensor:
    return torch.tensor([lesson.corner for lesson in lessons])


def _stretch(lessons: list[Lesson], choices: list[int]) -> int:
    return Random(f"stretch {lessons[0].clip.noise_seed}").choice(choices)


def answer(student: Student, packer: Packer, drawn: Lessons, stretch: int = 1) -> Losses:
    lessons, pixels = drawn
    visual = student.sequence(student.vision.project(_features(student, pixels, _corners(lessons))))
    return answer_loss(student.language, packer, lessons, visual, stretch)


def answer_from_far(student: Student, packer: Packer, drawn: Lessons) -> Losses:
    return answer(student, packer, drawn, _stretch(drawn[0], [1, 1, 2, 4]))


@torch.no_grad()
def _features(student: Student, pixels: Tensor, corners: Tensor) -> Tensor:
    """Windows of clips [B, T, H, W, 3] whose first patches lie at corners [B, 2] -> the tower's last layer
    [B, T, S, D], which is not trained any more."""
    t = pixels.shape[1]
    seen = [
        see(student.vision, clip.to(student.device), corner.expand(t, 2).to(student.device))[-1]
        for clip, corner in zip(pixels, corners)
    ]
    return torch.stack(seen)


STAGES = (
    Stage("see windows", ("tower", "heads"), 2200, 2e-3, 16, draw_windows, name_things, 50, muon=True),
    Stage("see frames", ("tower", "heads"), 400, 5e-4, 6, draw_frames, name_things, 20, muon=True),
    Stage("read descriptions", ("describer", "projector", "language"), 1200, 2e-3, 16, draw_descriptions,
          read_from_far, 50, muon=True, least=0.3),
    Stage("tell apart", ("describer", "language"), 400, 2e-3, 32, draw_several, read_from_far, 20, muon=True,
          least=0.2),
    Stage("meet", ("tower", "projector", "heads"), 1500, 1e-3, 32, draw_truth, meet, 20, muon=True),
    Stage("read on", ("language",), 200, 2e-3, 32, draw_descriptions_again, read_from_far, 20, muon=True,
          least=0.2),
    Stage("read whole clips", ("language",), 300, 1e-3, 1, draw_whole_descriptions, read_descriptions, 20, muon=True,
          least=0.2),
    Stage("answer short clips", ("projector", "language"), 260, 1e-3, 16, draw_short_clips, answer_from_far, 20,
          muon=True),
    Stage("answer clips", ("projector", "language"), 500, 6e-4, 1, draw_clips, answer, 20, muon=True),
    Stage("answer whole clips", ("projector", "language"), 600, 5e-4, 1, draw_more_clips, answer, 20, muon=True),
)
