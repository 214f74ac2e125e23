"""Questions about the small world: one right answer, found again here from what is visible frame by frame."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlytom.checkpoint.demo_tokenizer import tokenizer_files
from earlytom.demo.questions import KINDS, OPEN_KINDS, Question, one_question, questions_of
from earlytom.demo.world import COLOURS, SHAPES, SPLITS, Clip, make_clip

FRAMES = 32


def seen(clip: Clip) -> dict[str, list[tuple[int, str, float, float]]]:
    """Shape -> (frame, colour, x, y) of each frame that shows it. Shapes do not occur twice."""
    found: dict[str, list[tuple[int, str, float, float]]] = {}
    for frame in range(clip.frames):
        for thing in clip.visible(frame):
            found.setdefault(thing.shape, []).append((frame, clip.colour(thing, frame), *clip.centre(thing, frame)))
    return found


def answer_again(clip: Clip, question: Question) -> str:
    """The answer from what each frame shows and the question's words."""
    things = seen(clip)
    words = re.findall(r"[a-z]+", question.text)
    named = [word for word in words if word in things]
    if question.kind == "shape":
        (colour,) = (word for word in words if word in COLOURS)
        (shape,) = (name for name, shown in things.items() if any(look[1] == colour for look in shown))
        return shape
    if question.kind == "count":
        assert all(len(clip.visible(frame)) == len(things) for frame in range(clip.frames))
        return ("one", "two", "three", "four")[len(things) - 1]
    if question.kind == "order":
        starts = {shown[0][0]: name for name, shown in things.items()}
        assert len(starts) == len(things)
        return starts[min(starts) if "first" in words else max(starts)]
    if question.kind == "brief":
        (flash,) = (name for name, shown in things.items() if len(shown) <= 2)
        (colour,) = {look[1] for look in things[flash]}
        return flash if "shape" in question.text else colour
    (name,) = named
    shown = things[name]
    for word in words:
        if word in COLOURS:
            assert {look[1] for look in shown} == {word}
    if question.kind == "colour":
        (colour,) = {look[1] for look in shown}
        return colour
    if question.kind == "change":
        before, after = dict.fromkeys(look[1] for look in shown)
        return after
    (_, _, x0, y0), (_, _, x1, y1) = shown[0], shown[-1]
    if question.kind == "where":
        room = {"left": x0, "top": y0, "right": 384 - x0, "bottom": 384 - y0}  # to each side
        (side, least), (_, next_least), *_ = sorted(room.items(), key=lambda item: item[1])
        assert len({look[2:] for look in shown}) == 1 and next_least - least > 20
        return side
    assert question.kind == "motion" and (x0 == x1) != (y0 == y1)
    return ("left" if x1 < x0 else "right") if y0 == y1 else ("up" if y1 < y0 else "down")


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 20), st.integers(0, 10**5))
def test_the_answer_follows_from_what_is_seen(split: str, seed: int, index: int) -> None:
    clip = make_clip(split, seed, index, frames=FRAMES)
    questions = [question for question in questions_of(clip) if question.kind in KINDS]
    for question in questions:
        assert question.answer == answer_again(clip, question).capitalize()
    assert len({(question.kind, question.text) for question in questions}) == len(questions)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10**5), st.integers(4, 70), st.integers(0, 5))
def test_multiple_choice_has_four_options_and_one_is_right(split: str, index: int, frames: int, seed: int) -> None:
    clip = make_clip(split, 3, index, frames=frames)
    for question in questions_of(clip, seed):
        assert question.answer[0].isupper()
        if question.kind in OPEN_KINDS:
            assert not question.options and question.prompt == question.text
            continue
        assert len(question.options) == len(set(question.options)) == 4
        assert question.options.count(question.answer) == 1
        assert question.prompt.startswith(question.text[:-1] + ": ") and question.prompt.endswith("?")
        asked = question.prompt.removeprefix(question.text[:-1] + ": ").removesuffix("?")
        assert re.split(", | or ", asked) == [option.lower() for option in question.options]
        opened = question.opened()
        assert opened.prompt == question.text and not opened.options
        assert (opened.kind, opened.answer, opened.held_out) == (question.kind, question.answer, question.held_out)


def test_a_story_tells_what_comes_in_its_order() -> None:
    told = 0
    for index in range(150):
        clip = make_clip("test", 4, index)
        things = seen(clip)
        for question in questions_of(clip):
            if question.kind == "describe":
                told += 1
                shapes = [word for word in re.findall(r"\w+", question.answer) if word in SHAPES]
                assert shapes == sorted(things, key=lambda shape: things[shape][0][0])
                colours = [shown[0][1] for shown in (things[shape] for shape in shapes)]
                assert all(f"{colour} {shape}" in question.answer for colour, shape in zip(colours, shapes))
    assert told > 30


def test_every_kind_occurs_and_the_right_option_has_no_favourite_place() -> None:
    places = {kind: [0, 0, 0, 0] for kind in KINDS}
    for index in range(400):
        for question in questions_of(make_clip("test", 6, index)):
            if question.options:
                places[question.kind][question.options.index(question.answer)] += 1
    for counts in places.values():
        assert sum(counts) > 80 and all(0.12 < count / sum(counts) < 0.4 for count in counts)


def test_one_question_is_drawn_from_the_seed_and_prefers_what_was_held_out() -> None:
    drawn = set()
    for index in range(60):
        clip = make_clip("test", 7, index)
        for kind in (*KINDS, *OPEN_KINDS):
            of_kind = [question for question in questions_of(clip, 1) if question.kind == kind]
            question = one_question(clip, kind, 1)
            assert (question is None) == (not of_kind) and question == one_question(clip, kind, 1)
            if question is not None:
                assert question in of_kind
                assert question.held_out == any(other.held_out for other in of_kind)
            drawn.add(question == one_question(clip, kind, 2))
    assert drawn == {True, False}


def test_words_of_questions_and_answers_are_one_token_each() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_files()["tokenizer.json"])
    texts = {
        text for index in range(60) for question in questions_of(make_clip("test", 8, index))
        for text in ("\n" + question.prompt, question.answer)
    }
    assert len(texts) > 100
    for text in texts:
        assert len(tokenizer.encode(text).ids) == len(re.findall(r"\w+|[^\w ]", text)), text


@pytest.mark.parametrize("frames", [4, 5, 8])
def test_short_clips_have_questions(frames: int) -> None:
    assert sum(len(questions_of(make_clip("test", 9, index, frames=frames))) for index in range(20)) > 40
