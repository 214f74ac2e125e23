"""The hop of answers over a bundle: asked of both sides alike, failed when they differ, never passed unasked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from earlytom.errors import ConfigError
from earlytom.parity import HopReport, ParityReport
from earlytom.tower import TowerOutputs
from engines.bundle.manifest import Manifest
from engines.bundle.reader import Bundle, read_bundle
from export.cli import export_parser, filled, verify_main
from export.job import plan_job
from export.report import render_report
from export.settings import PROMPTS, QUESTIONS, ExportOptions, Questions, choose_questions
from export.verify.interview import Interview, drawn_clips
from tests.bundles import IDENTITY
from tests.cases import small_config, small_vision
from tests.shared import demo_bundle

HOP = HopReport("static", "onnxruntime", "fp32", "passed")


@pytest.fixture(scope="module")
def bundle():
    return read_bundle(demo_bundle())


@pytest.fixture(scope="module")
def interview(bundle):
    return Interview(bundle, Questions(("What happens?", "Where is it?")))


@pytest.fixture(scope="module")
def tokens(bundle):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(bundle.manifest.counts.tokens, bundle.manifest.geometry.projector_size, generator=generator)


@pytest.fixture(scope="module")
def other(interview, tokens):
    """A hop whose actual side has other visual tokens altogether."""
    return interview.report(HOP, [tokens], [-3 * tokens.flip(1)])


@pytest.mark.parametrize(
    ("given", "demo", "expected"),
    [
        ((None, None, None), True, Questions(PROMPTS, QUESTIONS - len(PROMPTS))),
        ((None, None, None), False, None),
        ((False, None, None), True, None),
        ((True, None, None), False, Questions(PROMPTS)),
        ((None, ["Why?"], None), False, Questions(("Why?",))),
        ((None, ["Why?", "Who?"], None), True, Questions(("Why?", "Who?"))),
        ((None, None, 500), True, Questions(PROMPTS, 498)),
        ((True, None, 1), True, Questions(PROMPTS[:1])),
    ],
)
def test_who_is_asked_what(given, demo, expected):
    assert choose_questions(*given, demo=demo) == expected


@pytest.mark.parametrize(
    ("given", "demo", "says"),
    [
        ((False, ["Why?"], None), True, "not to be compared"),
        ((False, None, 3), True, "not to be compared"),
        ((None, ["Why?"], 3), True, "own prompts are all"),
        ((None, None, 3), False, "only of the built-in demo"),
        ((None, None, 0), True, "at least 1"),
    ],
)
def test_contradictions_are_refused(given, demo, says):
    with pytest.raises(ConfigError, match=says):
        choose_questions(*given, demo=demo)


@pytest.mark.parametrize("asked", [{"answers": True}, {"prompts": ["Why?"]}, {"questions": 0}], ids=str)
def test_without_verifying_nothing_can_be_asked(asked):
    with pytest.raises(ConfigError, match="verifying, which is left out"):
        plan_job(ExportOptions(verify=False, **asked))


def test_options_are_typed():
    typed = export_parser().parse_args(["--prompt", "Why?", "--prompt", "Who?", "--answers"])
    assert filled(ExportOptions, typed) == ExportOptions(prompts=["Why?", "Who?"], answers=True)
    typed = export_parser().parse_args(["--no-answers", "--questions", "5"])
    assert filled(ExportOptions, typed) == ExportOptions(answers=False, questions=5)


def test_drawn_clips_are_as_many_as_the_questions_need():
    once, again = list(drawn_clips(20, 4)), list(drawn_clips(20, 4))
    assert sum(len(prompts) for _, prompts in once) == 20 and len(once) > 1
    assert all(torch.equal(a, b) and p == q for (a, p), (b, q) in zip(once, again))
    assert once[0][0].shape == (4, 384, 384, 3) and once[0][0].dtype == torch.uint8
    assert not list(drawn_clips(0, 4))


def test_a_batch_takes_several_drawn_clips_a_call():
    config = small_config()
    manifest = Manifest.derive(
        config, small_vision().geometry, dtype="fp32", batch=2, opset=20, attention="primitives", checkpoint=IDENTITY,
        tools={},
    )
    interview = Interview(Bundle(Path("nowhere"), manifest), Questions(("What?",)))
    interview.drawn = [(torch.full((12, 84, 84, 3), i, dtype=torch.uint8), ("What?",)) for i in (1, 2, 3)]
    calls = []

    def run(frames):
        calls.append(frames[:, 0, 0, 0, 0].tolist())
        marks = frames[:, :1, 0, 0, :1].to(torch.float32)
        return TowerOutputs(marks, torch.zeros(2, 1, 1), torch.zeros(2, 1), torch.zeros(2, 1, 1))

    verified = run(torch.full((2, 12, 84, 84, 3), 9, dtype=torch.uint8))
    assert [int(tokens) for tokens in interview.tokens(verified, run)] == [9, 1, 2, 3]
    assert calls[1:] == [[1, 2], [3, 3]]


def test_verifying_asks_when_it_is_told_to(bundle, capsys):
    """From the command to the manifest: the oracle's hop, and ONNX Runtime's."""
    assert verify_main([str(bundle.path), "--prompt", "What happens in this video?", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hops = tuple(map(HopReport.from_dict, found["hops"]))
    assert found["passed"] and [hop.answers.questions for hop in hops] == [1, 1]
    assert all(hop.answers.error < 0.1 < hop.answers.tokens and not judged(hop) for hop in hops)
    manifest = replace(bundle.manifest, parity=hops)
    assert Manifest.from_json(manifest.to_json()) == manifest
    report = render_report(manifest)
    assert f"{hops[1].answers.equal} of 1" in report and "answers equal" in report and "logit" in report
    assert "answers equal" not in render_report(bundle.manifest), "the bundle was not asked when it was made"


def judged(hop):
    return [divergence for divergence in hop.answers.divergences if not divergence.explained]


def test_equal_tokens_pass_and_excuse_nothing_else(interview, tokens):
    same = interview.report(HOP, [tokens], [tokens.clone()])
    assert same.status == "passed" and same.answers.equal == same.answers.questions == 2
    already = interview.report(replace(HOP, status="failed", reasons=("tokens differ",)), [tokens[:9]], [tokens[:9]])
    assert already.answers.equal == 2 and (already.status, already.reasons) == ("failed", ("tokens differ",))


def test_other_tokens_fail_the_hop(other):
    assert other.status == "failed" and judged(other)
    assert not ParityReport((other,)).passed and "answers differ" in ParityReport((other,)).reason


def test_the_report_shows_what_differs(other, bundle):
    text = render_report(replace(bundle.manifest, parity=(other,)))
    assert "What happens?" in text and "**fault**" in text and f"{other.answers.equal} of 2" in text


def test_what_cannot_be_asked_is_not_run(bundle, tokens):
    nobody = Interview(bundle, Questions(("What?",)), "/no/such/checkpoint")
    hop = nobody.report(HOP, [tokens], [tokens])
    assert hop.answers is None and "/no/such/checkpoint" in hop.unasked and not ParityReport((hop,)).complete
    report = render_report(replace(bundle.manifest, parity=(hop,)))
    assert "| not run |" in report and hop.unasked in report
