"""Questions about a drawn clip, each with one right answer that follows from the clip's description.

Multiple choice puts four options into the question and expects one of them, so chance is 25 %; the same question
without options is the open form. "describe" is open only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from .world import COLOURS, SHAPES, SIZE, Clip, Thing

KINDS = ("colour", "shape", "where", "motion", "order", "count", "brief", "change")  # multiple choice and open
OPEN_KINDS = ("describe",)
PLACES = ("left", "right", "top", "bottom")
NUMBERS = ("one", "two", "three", "four")
WAYS = ("left", "right", "up", "down")


@dataclass(frozen=True)
class Question:
    """What is asked, and the answer word for word; options: the four of multiple choice, in the order they are put.

    held_out: it is about a thing whose colour, shape and motion never occur together in training.
    """

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    held_out: bool = False

    @property
    def prompt(self) -> str:
        """What a person types: "What colour is the star: red, blue, green or white?"."""
        if not self.options:
            return self.text
        *most, last = (option.lower() for option in self.options)
        return f"{self.text.removesuffix('?')}: {', '.join(most)} or {last}?"

    def opened(self) -> Question:
        """The same question without its options."""
        return Question(self.kind, self.text, self.answer, (), self.held_out)


def questions_of(clip: Clip, seed: int = 0) -> list[Question]:
    """All questions that have one right answer for this clip; seed: of the options' choice and order."""
    rng = Random(f"earlytom demo options {seed} {clip.noise_seed}")
    return [
        Question(kind, text, _said(answer), tuple(map(_said, _options(rng, answer, pool))) if pool else (), held_out)
        for kind, text, answer, pool, held_out in _asked(clip)
    ]


def one_question(clip: Clip, kind: str, seed: int = 0) -> Question | None:
    """A question of this kind, drawn from the seed; None when the clip has none. About held-out things if there are."""
    found = [question for question in questions_of(clip, seed) if question.kind == kind]
    found = [question for question in found if question.held_out] or found
    return Random(f"earlytom demo question {seed} {clip.noise_seed} {kind}").choice(found) if found else None


Asked = tuple[str, str, str, Sequence[str], bool]  # kind, text, answer, what options are taken from, held out


def _asked(clip: Clip) -> Iterator[Asked]:
    lasting = [thing for thing in clip.things if not thing.brief]
    flashes = [thing for thing in clip.things if thing.brief]
    for thing in lasting:
        held_out = thing.held_out
        if thing.turn is None:
            yield "colour", f"What colour is the {thing.shape}?", thing.colour, COLOURS, held_out
            yield "shape", f"What shape is the {thing.colour} thing?", thing.shape, SHAPES, held_out
            name = thing.name
        else:
            yield "change", f"What colour does the {thing.shape} turn?", thing.turn[1], COLOURS, held_out
            name = thing.shape
        if thing.motion == "still" and (place := _place(thing)):
            yield "where", f"What side is the {name} on?", place, PLACES, held_out
        if thing.motion != "still" and clip.clock[thing.last - 1] > clip.clock[thing.first]:
            yield "motion", f"What way does the {name} move?", thing.motion, WAYS, held_out
    for thing in flashes:
        yield "brief", "Which shape flashes up?", thing.shape, SHAPES, thing.held_out
        yield "brief", "Which colour flashes up?", thing.colour, COLOURS, thing.held_out
    starts = [thing.first for thing in lasting]
    if len(lasting) > 1 and not flashes and starts[0] < starts[1]:
        seen = [thing.shape for thing in lasting]
        pool = seen + [shape for shape in SHAPES if shape not in seen][: max(0, 4 - len(seen))]
        yield "order", "Which shape comes first?", lasting[0].shape, pool, lasting[0].held_out
        yield "order", "Which shape comes last?", lasting[-1].shape, pool, lasting[-1].held_out
    held_out = any(thing.held_out for thing in clip.things)
    if not flashes and all(thing.first == 0 and thing.last == clip.frames for thing in lasting):
        yield "count", "How many things are there?", NUMBERS[len(lasting) - 1], NUMBERS, held_out
    if len(lasting) == 1 or starts == sorted(set(starts)):
        yield "describe", "What happens in this video?", _story(lasting, flashes), (), held_out


def _place(thing: Thing) -> str | None:
    """Which side a still thing is nearest to; None within 24 pixels of a diagonal, across or down."""
    dx, dy = abs(thing.x - SIZE / 2), abs(thing.y - SIZE / 2)
    return None if abs(dx - dy) < 24 else side_of(thing.x, thing.y)


def side_of(x: float, y: float) -> str:
    """Which of PLACES a point of the frame is in: the diagonals divide them."""
    dx, dy = x - SIZE / 2, y - SIZE / 2
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else "top" if dy < 0 else "bottom"


def _options(rng: Random, answer: str, pool: Sequence[str]) -> list[str]:
    """Four of the pool, the answer among them, in random order."""
    others = rng.sample([option for option in pool if option != answer], 3)
    options = [answer, *others]
    rng.shuffle(options)
    return options


def _said(answer: str) -> str:
    return answer[0].upper() + answer[1:]


def _story(lasting: Sequence[Thing], flashes: Sequence[Thing]) -> str:
    """ "A red star moves left, then a blue ring stays." """
    told = [(thing.first, _tale(thing)) for thing in (*lasting, *flashes)]
    return _said(", then ".join(tale for _, tale in sorted(told, key=lambda item: item[0]))) + "."


def _tale(thing: Thing) -> str:
    name = f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.name}"
    if thing.brief:
        return f"{name} flashes"
    if thing.turn is not None:
        return f"{name} turns {thing.turn[1]}"
    return f"{name} stays" if thing.motion == "still" else f"{name} moves {thing.motion}"
