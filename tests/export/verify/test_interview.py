"""The hop of answers over a bundle: asked of both sides alike, failed when they differ, never passed unasked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

from earlytom.errors import ConfigError
from earlytom.language.qwen2 import Qwen2
from earlytom.parity import HopReport, ParityReport
from earlytom.tower import StaticTower
from engines.bundle.manifest import Manifest
from engines.bundle.reader import Bundle, read_bundle
from export.cli import export_parser, filled, verify_main
from export.job import plan_job
from export.report import render_report
from export.settings import PROMPTS, QUESTIONS, ExportOptions, Questions, choose_questions
from export.verify.interview import Interview, Seen, drawn_clips
from tests.bundles import IDENTITY
from tests.cases import Letters, small_clip, small_config, small_vision
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


def small_interview(batch=1, clips=()):
    """Of the small tower; asks a small language model about the verified clip and about each of `clips`."""
    manifest = Manifest.derive(
        small_config(), small_vision().geometry, dtype="fp32", batch=batch, opset=20, attention="primitives",
        checkpoint=IDENTITY, tools={},
    )
    interview = Interview(Bundle(Path("nowhere"), manifest), Questions(("What?",)))
    interview.drawn = [(clip, ("What?",)) for clip in clips]
    interview.prompts = [("What?",)] * (1 + len(clips))
    torch.manual_seed(1)
    language = Qwen2(Qwen2Config(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=3, pad_token_id=0, bos_token_id=None,
    )).eval().requires_grad_(False)
    language.generation_config.eos_token_id = [3]
    interview._model = SimpleNamespace(language=language, tokenizer=Letters())
    return interview


def test_a_batch_takes_several_drawn_clips_a_call():
    clips = [small_clip(12, seed=seed)[0] for seed in range(4)]
    interview, calls = small_interview(2, clips[1:]), []
    tower, single = (StaticTower(small_vision(), small_config(), batch=size).eval() for size in (2, 1))

    def run(frames):
        calls.append([next(i for i, clip in enumerate(clips) if torch.equal(clip, video)) for video in frames])
        return tower.trace(frames)

    seen = interview.look(run(torch.stack([clips[0], clips[3]])), run)
    assert calls[1:] == [[1, 2], [3, 3]]
    for clip, one in zip(clips, seen, strict=True):
        expected = single(clip[None])
        torch.testing.assert_close(one.tokens, expected.tokens[0])
        assert torch.equal(one.video.weights, expected.weights[0]) and one.video.stages[0].hidden.numel() == 0


@pytest.fixture(scope="module")
def drawn():
    """An interview about a verified clip, a drawn one that moves and one that stands still; what the tower saw."""
    moving, other = (small_clip(12, seed=seed)[0] for seed in (1, 2))
    interview = small_interview(1, [moving, other[:1].expand(12, -1, -1, -1).contiguous()])
    tower = StaticTower(small_vision(), small_config()).eval()
    return interview, interview.look(tower.trace(small_clip(12)), tower.trace)


MOVING, STILL = 1, 2


def altered(seen, index, plan=False, tokens=0.0):
    """What an engine sees, which shows no scores: all as it is but clip `index`, of other frames or with an error."""
    out = [Seen(one.tokens, one.video._replace(stages=(), similarity=None, received=None)) for one in seen]
    one = out[index]
    if plan:
        weights = one.video.weights.roll(1, 1)
        out[index] = Seen(3 * one.tokens.flip(1), one.video._replace(weights=weights))
    elif tokens:
        moved = tuple(token + tokens for token in one.video.tokens)
        out[index] = Seen(one.tokens + tokens, one.video._replace(tokens=moved))
    return out


def test_drawn_clips_that_agree_pass(drawn):
    interview, seen = drawn
    hop = interview.compare(HOP, seen, seen, altered(seen, MOVING), None)
    assert hop.status == "passed" and (hop.answers.equal, hop.answers.questions) == (3, 3)


def test_a_tie_of_a_drawn_clips_plan_explains_other_answers(drawn):
    """Copies of a frame: whichever of them are left, nobody is to blame, and the answers are to other frames."""
    interview, seen = drawn
    engine = altered(seen, STILL, plan=True)
    hop = interview.compare(HOP, seen, seen, engine, None)
    assert hop.status == "passed" and hop.answers.error == 0
    (found,) = hop.answers.divergences
    assert found.clip == STILL and "other frames" in found.parting and found.margin > 2 * found.allowed
    assert "clip 2 part at a tie" in render_report(replace(small_interview().manifest, parity=(hop,)))
    assert interview.compare(HOP, seen, engine, seen, None).answers.explained == 1, "whichever side parts"
    both = interview.compare(HOP, seen, engine, engine, None)
    assert both.status == "passed" and both.answers.equal == 3 and not both.answers.divergences


def test_another_plan_without_a_tie_fails(drawn):
    interview, seen = drawn
    hop = interview.compare(HOP, seen, seen, altered(seen, MOVING, plan=True), None)
    assert hop.status == "failed" and any("no ties" in reason for reason in hop.reasons)
    assert hop.answers.differing == 1 and not hop.answers.explained


def test_a_drawn_clip_holds_the_tolerance_of_tokens(drawn):
    """Though nobody may notice from the answers."""
    interview, seen = drawn
    hop = interview.compare(HOP, seen, seen, altered(seen, MOVING, tokens=1e-3), None)
    assert hop.status == "failed" and "drawn clips, against the static tower: tokens has" in hop.reasons[0]
    assert interview.compare(HOP, seen, seen, altered(seen, MOVING, tokens=1e-5), None).status == "passed"


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
