"""lmms-eval's requests as questions: the two forms alike, and what is no question about one whole video refused."""

from __future__ import annotations

from typing import Any

import pytest

from earlytom.errors import InputError
from engines.lmms.answering import batches
from engines.lmms.questions import Generation, VideoQuestion, chat_question, read_generation, simple_question

VIDEO, TEXT = {"type": "video", "url": "a.mp4"}, {"type": "text", "text": "What?"}


def test_both_forms_ask_alike() -> None:
    expected = VideoQuestion("a.mp4", "What?", Generation(), "document 3 of t")
    assert simple_question("What?", ["a.mp4"], Generation(), "document 3 of t") == expected
    assert chat_question([{"role": "user", "content": [VIDEO, TEXT]}], Generation(), "document 3 of t") == expected


def test_texts_of_a_message_follow_one_another() -> None:
    more = {"type": "text", "text": "Answer briefly."}
    asked = chat_question([{"role": "user", "content": [VIDEO, TEXT, more]}], Generation(), "x")
    assert asked.text == "What?\nAnswer briefly."


@pytest.mark.parametrize(
    ("visuals", "told"),
    [([], "has 0 visuals"), (None, "comes with a NoneType"), (["a.mp4", "b.mp4"], "has 2 visuals"),
     ([{"url": "a.mp4"}], "comes with a dict")],
)
def test_what_is_no_video_is_refused(visuals: Any, told: str) -> None:
    with pytest.raises(InputError, match=f"document 3 of t {told}"):
        simple_question("What?", visuals, Generation(), "document 3 of t")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([("system", [TEXT]), ("user", [VIDEO, TEXT])], "a conversation of system, user"),
        ([("user", [VIDEO, TEXT]), ("assistant", [TEXT]), ("user", [TEXT])], "a conversation of user, assistant, user"),
        ([("user", [TEXT])], "has 0 visuals"),
        ([("user", [{"type": "image", "url": "a.png"}, TEXT])], "comes with image"),
        ([("user", [TEXT, VIDEO])], "has text before its video"),
        ([("user", [VIDEO | {"start_time": 1.5}, TEXT])], "asks about a part of a video"),
    ],
)
def test_other_conversations_are_refused(messages: list[tuple[str, list[Any]]], told: str) -> None:
    given = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(InputError, match=told):
        chat_question(given, Generation(), "document 3 of t")


def test_the_benchmarks_settings_are_greedy() -> None:
    """As VideoMME, MVBench and EgoSchema have them."""
    given = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    made = read_generation(given | {"until": ["\n\n"]}, "t")
    assert made.max_new_tokens == 16 and made.keywords() == {"do_sample": False}


@pytest.mark.parametrize(
    ("given", "keywords"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}),
        ({"do_sample": True, "top_p": 0.9, "temperature": None}, {"do_sample": True, "top_p": 0.9}),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, {"do_sample": False, "num_beams": 3}),
    ],
)
def test_what_generation_is_given(given: dict[str, Any], keywords: dict[str, Any]) -> None:
    assert read_generation(given, "t").keywords() == keywords


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(InputError, match="document 3 of t asks for generation with best_of, which"):
        read_generation({"best_of": 3}, "document 3 of t")


@pytest.mark.parametrize(
    ("until", "text", "expected"),
    [(None, " A \n\nB", "A \n\nB"), ("\n\n", " A \n\nB", "A"), (["", "B", "\n\n"], "A\n\nB", "A"), ([], " A ", "A")],
)
def test_answers_end_where_the_task_says(until: Any, text: str, expected: str) -> None:
    assert read_generation({"until": until}, "t").cut(text) == expected


def test_a_batch_is_of_neighbours_with_the_same_settings() -> None:
    short, long = Generation(4), Generation(8)
    asked = [VideoQuestion("v", str(i), settings, "") for i, settings in enumerate([short] * 3 + [long] + [short] * 2)]
    found = [[question.text for question in batch] for batch in batches(asked, 2)]
    assert found == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert [len(batch) for batch in batches(asked, 1)] == [1] * 6 and not list(batches([], 3))
