"""Answers as numbers of a hop: what is equal, which difference is a near-tie, and which one fails."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config

from earlytom.config import InnerMerging
from earlytom.errors import InputError
from earlytom.language.qwen2 import Qwen2
from earlytom.parity import (
    TOLERANCES,
    AnswerAgreement,
    Divergence,
    HopReport,
    ParityReport,
    compare_answers,
    judge_answers,
    logits_limit,
)
from tests.cases import Letters

INNER = InnerMerging(layer=2, ratio=0.5)
PROMPTS = [["What happens?", "Where is the star?"], ["How many things are there?"]]


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=3, pad_token_id=0, bos_token_id=None,
    )
    model = Qwen2(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = [3]
    return model


@pytest.fixture
def videos():
    return [torch.randn(40, 32), torch.randn(30, 32)]


def ask(language, reference, actual, dtype="fp32", new_tokens=8, partings=()):
    return compare_answers(
        language, Letters(), PROMPTS, reference, actual, inner=INNER, limit=logits_limit(dtype, INNER),
        new_tokens=new_tokens, partings=partings,
    )


def divergence(**changes):
    return replace(Divergence("What?", 0, 2, "A red", " star", " ring", 0.1, 0.06, 0.2), **changes)


@pytest.mark.parametrize(
    ("changes", "explained"),
    [
        ({}, True),
        ({"margin": 0.13}, False),  # no logit is off by so much: what was measured contradicts itself
        ({"margin": 3.0, "error": 2.0}, False),  # the usual fault: other tokens, other logits
        ({"margin": 0.3, "error": 2.0}, True),
        ({"margin": 0.0, "error": 0.0, "allowed": 0.0}, True),
        ({"margin": 0.0, "error": math.inf}, False),
        ({"margin": math.inf, "error": math.inf, "allowed": math.inf}, False),
    ],
)
def test_a_near_tie_is_what_the_dtype_may_exchange(changes, explained):
    found = divergence(**changes)
    assert found.explained is explained
    answers = AnswerAgreement(5, 4, 20, 18, found.error, 0.1, (found,))
    assert answers.explained == explained
    reasons = judge_answers(answers)
    assert not reasons if explained else "'What?'" in reasons[0] and "' ring' in place of ' star'" in reasons[0]


def test_a_tie_of_the_plans_explains_other_answers_but_no_numbers_nothing():
    far = divergence(margin=9.0, error=8.0)
    assert not far.explained and replace(far, parting="at merge layer 8").explained
    assert not divergence(error=math.inf, parting="at merge layer 8").explained


def test_clips_with_other_frames_are_asked_but_their_logits_not_compared(language, videos):
    other = [videos[0], 3 * videos[1].flip(1)]
    blamed = ask(language, videos, other)
    found = ask(language, videos, other, partings=["", "after the last merge layer, a tie"])
    assert blamed.error > 0.1 and judge_answers(blamed)
    assert found.error == 0 and found.closest > 0 and not judge_answers(found)
    assert (found.questions, found.equal, found.common) == (blamed.questions, blamed.equal, blamed.common) == (
        3, 2, found.common
    )
    assert [d.parting for d in found.divergences] == ["after the last merge layer, a tie"]
    assert found.explained == 1 and blamed.explained == 0
    with pytest.raises(InputError, match="1 partings"):
        ask(language, videos, videos, partings=["a tie"])


def test_equal_tokens_give_equal_answers(language, videos):
    found = ask(language, videos, [video.clone() for video in videos])
    assert (found.questions, found.equal, found.common) == (3, 3, found.tokens)
    assert found.error == 0 and found.closest > 0 and not found.divergences and not judge_answers(found)


def test_answers_are_those_that_are_given_one_by_one(language, videos):
    """In batches, padded, they are the answers of a pipeline: the run of a question alone is as long."""
    other = [video.roll(1, 0) for video in videos]
    together = ask(language, videos, other)
    alone = [
        compare_answers(language, Letters(), [[question]], [a], [b], inner=INNER, limit=0.1, new_tokens=8)
        for asked, a, b in zip(PROMPTS, videos, other) for question in asked
    ]
    assert together.questions == 3 and together.common == sum(one.common for one in alone)
    assert together.equal == sum(one.equal for one in alone)
    assert together.error == pytest.approx(max(one.error for one in alone), rel=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_wrong_visual_tokens_fail_in_every_dtype(language, videos, dtype):
    """Though the error of the logits is as large as the margin: it is no excuse."""
    found = ask(language, videos, [3 * video.flip(1) for video in videos], dtype)
    assert found.equal < found.questions and found.explained < found.differing
    worst = found.divergences[0]
    assert worst.margin <= 2 * worst.error and not worst.explained
    assert judge_answers(found)


def test_rounding_that_exchanges_a_near_tie_passes(language, videos):
    """Two rows of the last layer that are all but one: whichever of their tokens is chosen, by rounding alone."""
    noisy = [video + 1e-4 * torch.randn_like(video) for video in videos]
    rows = language.lm_head.weight.data
    kept = rows.clone()
    try:
        rows[32:] = rows[:32] + 1e-5 * torch.randn(32, 32)
        found = ask(language, videos, noisy, new_tokens=50)
    finally:
        rows.copy_(kept)
    assert found.closest < 1e-3
    assert found.differing and found.explained == found.differing and not judge_answers(found)
    assert found.common < found.tokens


def test_no_numbers_fail(language, videos):
    found = ask(language, videos, [video * math.nan for video in videos])
    assert found.equal == found.common == 0 and found.error == math.inf and judge_answers(found)
    again = ask(language, [video * math.nan for video in videos], [video * math.nan for video in videos])
    assert again.equal == 0 and judge_answers(again), "equal, but nothing that was computed"
    assert AnswerAgreement.from_dict(json.loads(json.dumps(again.to_dict(), allow_nan=False))) == again


def test_what_does_not_fit_is_refused(language, videos):
    with pytest.raises(InputError, match="2 lists of prompts"):
        ask(language, videos[:1], videos[:1])


# The plain data.

NUMBERS = st.one_of(st.floats(0, 1e6), st.just(math.inf))
DIVERGENCES = st.builds(
    Divergence, question=st.text(max_size=9), clip=st.integers(0, 99), index=st.integers(0, 99),
    common=st.text(max_size=9), reference=st.text(max_size=5), actual=st.text(max_size=5), margin=NUMBERS,
    error=NUMBERS, allowed=NUMBERS, parting=st.text(max_size=5),
)


@settings(max_examples=40)
@given(st.lists(DIVERGENCES, max_size=4), st.integers(0, 500), st.integers(0, 90), NUMBERS, NUMBERS)
def test_json_keeps_everything(divergences, equal, common, error, closest):
    questions = equal + len(divergences)
    answers = AnswerAgreement(questions, equal, questions + common, common, error, closest, tuple(divergences))
    hop = HopReport("static", "onnxruntime", "fp16", "failed", ("why",), answers=answers)
    assert HopReport.from_dict(json.loads(json.dumps(hop.to_dict(), allow_nan=False))) == hop


def test_what_is_left_out_is_counted():
    near, far = divergence(margin=0.0), divergence(margin=9.0)
    answers = AnswerAgreement(99, 40, 99, 9, 1.0, 0.1, (*[far] * 4, *[near] * 55))
    short = answers.worst(10)
    assert len(short.divergences) == 10 and (short.differing, short.explained) == (59, 55)
    assert judge_answers(short) == judge_answers(answers) and AnswerAgreement.from_dict(short.to_dict()) == short
    assert len(answers.worst(2).divergences) == 4, "none that fails the hop is left out"


def test_manifests_of_before_are_read_and_written_as_they_were():
    hop = HopReport("static", "onnxruntime", "fp32", "not run", ("no package",))
    assert not {"answers", "unasked"} & hop.to_dict().keys()
    assert HopReport.from_dict(hop.to_dict()) == hop
    assert "parting" not in divergence().to_dict() and Divergence.from_dict(divergence().to_dict()) == divergence()


def good():
    answers = AnswerAgreement(3, 2, 20, 18, 0.1, 0.1, (divergence(),))
    return HopReport("static", "onnxruntime", "fp32", "passed", answers=answers).to_dict()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda hop: hop.update(answers=None),
        lambda hop: hop.update(answers=[]),
        lambda hop: hop.update(unasked=3),
        lambda hop: hop.update(unasked="no tokenizer"),  # and yet there are answers
        lambda hop: hop["answers"].pop("equal"),
        lambda hop: hop["answers"].update(extra=1),
        lambda hop: hop["answers"].update(equal=True),
        lambda hop: hop["answers"].update(equal=4),
        lambda hop: hop["answers"].update(common=21),
        lambda hop: hop["answers"].update(explained=2),
        lambda hop: hop["answers"].update(divergences=[], explained=0),
        lambda hop: hop["answers"].update(divergences={}),
        lambda hop: hop["answers"]["divergences"][0].pop("margin"),
        lambda hop: hop["answers"]["divergences"][0].update(index="2"),
        lambda hop: hop["answers"]["divergences"][0].update(question=None),
        lambda hop: hop["answers"]["divergences"][0].update(parting=None),
    ],
)
def test_json_that_says_nonsense_is_refused(spoil):
    hop = good()
    HopReport.from_dict(hop)
    spoil(hop)
    with pytest.raises(InputError):
        HopReport.from_dict(hop)


def test_what_was_not_asked_is_not_complete():
    hop = HopReport("static", "onnxruntime", "fp32", "passed", unasked="no tokenizer")
    assert HopReport.from_dict(hop.to_dict()) == hop
    assert not ParityReport((hop,)).complete and ParityReport((replace(hop, unasked=""),)).complete
