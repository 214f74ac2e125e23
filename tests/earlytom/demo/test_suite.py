"""A suite: as many questions of each kind, the same every time, of its own split."""

from __future__ import annotations

from collections import Counter

import pytest

from earlytom.demo.questions import KINDS, OPEN_KINDS, questions_of
from earlytom.demo.suite import make_suite
from earlytom.demo.world import SPLITS, make_clip
from earlytom.errors import ConfigError


@pytest.mark.parametrize(("form", "slots"), [("choice", 8), ("open", 9), ("both", 17)])
@pytest.mark.parametrize("number", [3, 60])
def test_kinds_are_balanced(form: str, slots: int, number: int) -> None:
    suite = make_suite(number, seed=2, form=form)
    counts = Counter((question.kind, bool(question.options)) for question in suite.questions)
    assert len(suite.questions) == number and sum(counts.values()) == number
    assert len(counts) == min(number, slots) and max(counts.values()) - min(counts.values()) <= 1
    assert set(suite.kinds) == {kind for kind, _ in counts} <= {*KINDS, *(OPEN_KINDS if form != "choice" else ())}


def test_it_follows_from_the_seed_and_asks_about_clips_in_order() -> None:
    suite = make_suite(40, seed=3)
    assert suite == make_suite(40, seed=3) != make_suite(40, seed=4)
    indices = [asked.index for asked in suite.asked]
    assert indices == sorted(set(indices)) and len(indices) < 40  # several questions share a clip
    for asked in suite.asked:
        assert asked.clip == make_clip("test", 3, asked.index) and asked.questions
        assert set(asked.questions) <= set(questions_of(asked.clip, 3))
        assert len({question.kind for question in asked.questions}) == len(asked.questions)
    assert sum(question.held_out for question in suite.questions) > 20


def test_open_and_choice_ask_the_same() -> None:
    choice, opened = make_suite(16, seed=5), make_suite(18, seed=5, form="open")
    texts = {question.text for question in choice.questions}
    assert texts <= {question.text for question in opened.questions}
    assert not any(question.options for question in opened.questions)


def test_splits_share_no_clip() -> None:
    clips = [{asked.clip for asked in make_suite(40, split=split).asked} for split in SPLITS]
    assert sum(map(len, clips)) == len(set.union(*clips))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"questions": 0}, "at least 1"), ({"form": "closed"}, "choice, open, both"), ({"split": "dev"}, "train"),
     ({"frames": 2}, "at least 4")],
)
def test_refusals(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_suite(**settings)  # type: ignore[arg-type]
