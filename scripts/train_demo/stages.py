"""The recipe: what each stage trains, on what, for how long. Only full tokens are ever seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import COARSE, EVEN, HARD, Lesson, Packer, answer_loss, make_lessons
from .student import Student
from .tower import GRID, WINDOW, Batch, loss_of, make_batch, see

Losses = tuple[Tensor, dict[str, float]]
Lessons = tuple[list[Lesson], Tensor]  # and what is seen of each: pixels uint8 [B, T, H, W, 3], or descriptions


@dataclass(frozen=True)
class Stage:
    """trains: parts of the student (student.py); draw: what step number `step` is about, from (step, size), in any
    process; loss: of what was drawn; size: clips or frames of a step.

    The learning rate rises for `warmup` steps to `rate` and falls as a cosine to a twentieth of it.
    """

    name: str
    trains: tuple[str, ...]
    steps: int
    rate: float
    size: int
    draw: Callable[[int, int], Any]
    loss: Callable[[Student, Packer, Any], Losses]
    warmup: int = 200


SEED = 0


def draw_windows(step: int, size: int) -> Batch:
    return make_batch(SEED, step, size, WINDOW)


def draw_frames(step: int, size: int) -> Batch:
    return make_batch(SEED + 100, step, size, GRID)


def name_things(student: Student, packer: Packer, batch: Batch) -> Losses:
    return loss_of(student.vision, student.heads, batch.to(student.device))


def draw_descriptions(step: int, size: int) -> Lessons:
    """What a perfect tower would say: no pixel is drawn, patches are coarse.

    The language model soon counts and sees motion, and long tells no colour from another: then one thing a clip, later
    two, are easier.
    """
    most = 4 if step < 850 else 1 if step < 1250 else 2 if step < 1600 else 4
    frames = Random(step).choice([4] if step < 1600 else [4, 6, 8, 12, 16])
    side, patch = COARSE
    lessons = make_lessons(SEED, step, size, frames, side, 6, patch, most, EVEN if step < 2800 else HARD)
    described = torch.stack([lesson.labels() for lesson in lessons])
    return lessons, described + 0.05 * torch.randn(described.shape, generator=torch.Generator().manual_seed(step))


def read_descriptions(student: Student, packer: Packer, drawn: Lessons) -> Losses:
    lessons, described = drawn
    visual = student.sequence(student.describer(described.to(student.device)))
    return answer_loss(student.language, packer, lessons, visual)


def draw_truth(step: int, size: int) -> tuple[Tensor, Tensor]:
    """Pixels of short clips, and what a perfect tower would say of them."""
    lessons = make_lessons(SEED + 200, step, size, 4, GRID, 1)
    return torch.stack([lesson.pixels() for lesson in lessons]), torch.stack([lesson.labels() for lesson in lessons])


def meet(student: Student, packer: Packer, drawn: tuple[Tensor, Tensor]) -> Losses:
    """The projector learns to say of the tower's features what the describer says of the truth."""
    pixels, truth = drawn
    said = student.vision.project(_features(student, pixels))
    with torch.no_grad():
        meant = student.describer(truth.to(student.device))
    loss = F.mse_loss(said, meant) / meant.var()
    return loss, {"unexplained": loss.item()}


def draw_short_clips(step: int, size: int) -> Lessons:
    frames = Random(step).choice([4, 4, 8, 16])
    return _filmed(make_lessons(SEED + 400, step, max(1, size * 4 // frames), frames, GRID, 8, weights=HARD))


def draw_clips(step: int, size: int) -> Lessons:
    return _filmed(make_lessons(SEED + 500, step, size, 32, GRID, 12, weights=HARD))


def _filmed(lessons: list[Lesson]) -> Lessons:
    return lessons, torch.stack([lesson.pixels() for lesson in lessons])


def answer(student: Student, packer: Packer, drawn: Lessons) -> Losses:
    lessons, pixels = drawn
    return answer_loss(
        student.language, packer, lessons, student.sequence(student.vision.project(_features(student, pixels)))
    )


@torch.no_grad()
def _features(student: Student, pixels: Tensor) -> Tensor:
    """Whole frames [B, T, H, W, 3] -> the tower's last layer [B, T, S, D], which is not trained any more."""
    corner = torch.zeros(pixels.shape[1], 2, dtype=torch.int64, device=student.device)
    return torch.stack([see(student.vision, clip.to(student.device), corner)[-1] for clip in pixels])


STAGES = (
    Stage("see windows", ("tower", "heads"), 3000, 1.5e-3, 16, draw_windows, name_things),
    Stage("see frames", ("tower", "heads"), 300, 3e-4, 6, draw_frames, name_things, 20),
    Stage("read descriptions", ("describer", "projector", "language"), 6000, 1.5e-3, 16, draw_descriptions,
          read_descriptions),
    Stage("meet", ("projector",), 300, 2e-3, 4, draw_truth, meet, 20),
    Stage("answer short clips", ("projector", "language"), 300, 5e-4, 8, draw_short_clips, answer, 20),
    Stage("answer clips", ("projector", "language"), 60, 2e-4, 1, draw_clips, answer, 10),
)
