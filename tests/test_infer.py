"""`earlytom-infer` on a bundle of a small demo: answers, times, pictures."""

import io
import json

import pytest
import torch
from PIL import Image

from earlytom import StaticTower, generate, load, read_frames
from earlytom.language.prompt import build_prompt
from engines.bundle.reader import read_bundle
from engines.infer import main
from tests import clips
from tests.shared import demo_bundle, small_demo

VIDEO = str(clips.real("bikes"))


@pytest.fixture(scope="module")
def bundle():
    return str(demo_bundle())


def ask(bundle, *more):
    return main(["--bundle", bundle, "--video", VIDEO, "--max-new-tokens", "8", *more])


def test_answers_stream_and_times_are_told(bundle, capsys):
    assert ask(bundle, "--prompt", "What happens in this video?", "--prompt", "How many riders are there?") == 0
    captured = capsys.readouterr()
    for question in ("What happens in this video?", "How many riders are there?"):
        assert f"> {question}" in captured.out
    for word in ("decode", "resize", "vision", "prefill", "tokens/s", "time to first token"):
        assert word in captured.out
    assert "engine: " in captured.err and "onnxruntime" in captured.err.lower()


def test_the_answer_is_that_of_the_pytorch_model(bundle, capsys):
    assert ask(bundle, "--prompt", "What is this?", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    manifest = read_bundle(bundle).manifest
    model = load(small_demo())
    frames = torch.from_numpy(read_frames(VIDEO, frames=8, size=196).frames)[None]
    tokens = StaticTower(model.vision, manifest.config)(frames).tokens[0]
    prompt = build_prompt(model.tokenizer, "What is this?")
    expected = generate(model, prompt, tokens, inner=manifest.config.inner, max_new_tokens=8)
    assert result["answers"][0]["ids"] == expected.tolist()
    assert result["engine"] == "onnxruntime" and set(result["seconds"]) == {"load", "decode", "resize", "vision"}
    assert ask(bundle, "--prompt", "What is this?", "--json", "--engine", "torch") == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["ids"] == expected.tolist()


def test_interactive_asks_on_about_the_same_video(bundle, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\nAnd now?\n\n"))
    assert ask(bundle, "--interactive") == 0
    out = capsys.readouterr().out
    assert out.count("[prefill") == 2 and "> And now?" in out


def test_explain_draws_a_picture(bundle, tmp_path, capsys):
    path = tmp_path / "kept.png"
    assert ask(bundle, "--prompt", "What is this?", "--explain", str(path)) == 0
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 400
    assert ask(bundle, "--prompt", "What is this?", "--explain", str(tmp_path / "no" / "kept.png")) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_sampling_is_repeatable_and_inner_merging_can_be_left_out(bundle, capsys):
    def ids(*more):
        assert ask(bundle, "--prompt", "What is this?", "--json", *more) == 0
        return json.loads(capsys.readouterr().out)["answers"][0]["ids"]

    sampled = ids("--sample", "--temperature", "1.5", "--seed", "3")
    assert sampled == ids("--sample", "--temperature", "1.5", "--seed", "3")
    assert sampled != ids("--sample", "--temperature", "1.5", "--seed", "4")
    assert len(ids("--no-inner")) >= 1


def test_usage_errors_are_told(bundle, capsys):
    for argv in (["--bundle", bundle, "--video", VIDEO], ["--bundle", bundle, "--video", VIDEO, "--prompt", "a",
                                                          "--max-new-tokens", "0"]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err
    assert ask(bundle, "--prompt", "What?", "--engine", "magic") == 1
    assert "no engine 'magic'" in capsys.readouterr().err
