"""The recipe: what each stage trains, on what, for how long. Only full tokens are ever seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import COARSE, EVEN, HARD, Lesson, Packer, answer_loss, make_lessons
from .student import Student
from .tower import GRID, WINDOW, loss_of, make_batch, see

Losses = tuple[Tensor, dict[str, float]]


@dataclass(frozen=True)
class Stage:
    """trains: parts of the student (student.py); loss: of a step; size: clips or frames of a step.

    The learning rate rises for `warmup` steps to `rate` and falls as a cosine to a twentieth of it.
    """

    name: str
    trains: tuple[str, ...]
    steps: int
    rate: float
    size: int
    loss: Callable[[Student, Packer, int, int], Losses]
    warmup: int = 200


SEED = 0


def see_windows(student: Student, packer: Packer, step: int, size: int) -> Losses:
    return loss_of(student.vision, student.heads, make_batch(SEED, step, size, WINDOW))


def see_frames(student: Student, packer: Packer, step: int, size: int) -> Losses:
    return loss_of(student.vision, student.heads, make_batch(SEED + 100, step, size, GRID))


def read_descriptions(student: Student, packer: Packer, step: int, size: int) -> Losses:
    """The language model learns from what a perfect tower would say: no pixel is drawn, patches are coarse.

    It soon counts and sees motion, and long tells no colour from another: then one thing a clip, later two, are easier.
    """
    most = 4 if step < 850 else 1 if step < 1250 else 2 if step < 1600 else 4
    frames = Random(step).choice([4] if step < 1600 else [4, 6, 8, 12, 16])
    side, patch = COARSE
    lessons = make_lessons(SEED, step, size, frames, side, 6, patch, most, EVEN if step < 2800 else HARD)
    noise = torch.Generator().manual_seed(step)
    described = torch.stack([lesson.labels() for lesson in lessons])
    described = described + 0.05 * torch.randn(described.shape, generator=noise)
    return answer_loss(student.language, packer, lessons, student.sequence(student.describer(described)))


def meet(student: Student, packer: Packer, step: int, size: int) -> Losses:
    """The projector learns to say of the tower's features what the describer says of the truth."""
    lessons = make_lessons(SEED + 200, step, size, 4, GRID, 1)
    features = _features(student, lessons)
    said = student.vision.project(features)
    with torch.no_grad():
        meant = student.describer(torch.stack([lesson.labels() for lesson in lessons]))
    loss = F.mse_loss(said, meant) / meant.var()
    return loss, {"unexplained": loss.item()}


def answer_frames(student: Student, packer: Packer, step: int, size: int) -> Losses:
    frames = Random(step).choice([4, 4, 8, 16])
    clips = max(1, size * 4 // frames)
    return _answer(student, packer, make_lessons(SEED + 400, step, clips, frames, GRID, 8, weights=HARD))


def answer_clips(student: Student, packer: Packer, step: int, size: int) -> Losses:
    return _answer(student, packer, make_lessons(SEED + 500, step, size, 32, GRID, 12, weights=HARD))


def _answer(student: Student, packer: Packer, lessons: list[Lesson]) -> Losses:
    visual = student.sequence(student.vision.project(_features(student, lessons)))
    return answer_loss(student.language, packer, lessons, visual)


@torch.no_grad()
def _features(student: Student, lessons: list[Lesson]) -> Tensor:
    """The tower's last layer [B, T, S, D], frame by frame group: it is not trained any more."""
    rows = []
    for lesson in lessons:
        corner = torch.tensor([lesson.corner]).expand(lesson.clip.frames, 2)
        rows.append(see(student.vision, lesson.pixels(), corner)[-1])
    return torch.stack(rows)


STAGES = (
    Stage("see windows", ("tower", "heads"), 3000, 1.5e-3, 16, see_windows),
    Stage("see frames", ("tower", "heads"), 300, 3e-4, 6, see_frames, 20),
    Stage("read descriptions", ("describer", "projector", "language"), 6000, 1.5e-3, 16, read_descriptions),
    Stage("meet", ("projector",), 300, 2e-3, 4, meet, 20),
    Stage("answer frames", ("projector", "language"), 300, 5e-4, 8, answer_frames, 20),
    Stage("answer clips", ("projector", "language"), 60, 2e-4, 1, answer_clips, 10),
)
