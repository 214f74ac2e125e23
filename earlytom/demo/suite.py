"""Which questions an evaluation asks about which drawn clips: as many of each kind, clips in order, all from a seed."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .questions import KINDS, OPEN_KINDS, Question, one_question
from .world import Clip, make_clip

FORMS = ("choice", "open", "both")


@dataclass(frozen=True)
class Asked:
    """A clip and what is asked about it. index: of the clip in its split."""

    index: int
    clip: Clip
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Suite:
    """Questions about drawn clips of `frames` frames; see make_suite."""

    split: str
    seed: int
    form: str
    frames: int
    asked: tuple[Asked, ...]

    @property
    def questions(self) -> list[Question]:
        """All of them, in the order in which they are asked."""
        return [question for asked in self.asked for question in asked.questions]

    @property
    def kinds(self) -> tuple[str, ...]:
        found = {question.kind for question in self.questions}
        return tuple(kind for kind in (*KINDS, *OPEN_KINDS) if kind in found)


def make_suite(
    questions: int = 100, *, seed: int = 0, split: str = "test", form: str = "choice", frames: int = 32
) -> Suite:
    """`questions` questions, as many of each kind, or one more of the first kinds.

    form: "choice" (four options), "open" (with "describe" as one more kind), or "both", which asks as many of each kind
    in each form. Clips are taken in order; of a clip, one question of each kind and form that is still wanted, about
    a thing held out of training where there is one; clips without such a question are passed over. Raises ConfigError.
    """
    if form not in FORMS:
        raise ConfigError(f"the form of questions is {form!r}, it must be one of {', '.join(FORMS)}")
    if questions < 1:
        raise ConfigError(f"{questions} questions are too few, at least 1 is needed")
    wanted = [(kind, False) for kind in KINDS if form != "open"]
    wanted += [(kind, True) for kind in (*KINDS, *OPEN_KINDS) if form != "choice"]
    left = {slot: questions // len(wanted) + (i < questions % len(wanted)) for i, slot in enumerate(wanted)}
    asked: list[Asked] = []
    index = 0
    while any(left.values()):
        clip = make_clip(split, seed, index, frames=frames)
        found = []
        for kind, opened in wanted:
            question = one_question(clip, kind, seed) if left[kind, opened] else None
            if question is not None:
                found.append(question.opened() if opened else question)
                left[kind, opened] -= 1
        if found:
            asked.append(Asked(index, clip, tuple(found)))
        index += 1
    return Suite(split, seed, form, frames, tuple(asked))
