"""`earlytom-infer` on a bundle of a small demo: answers, times, pictures."""

import gc
import io
import json

import pytest
import torch
from PIL import Image

import engines
from earlytom import StaticTower, encode_video, generate, load, read_frames
from earlytom.errors import EarlyTomError, EngineError
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


def test_the_video_may_be_read_anew_for_each_question(bundle, capsys, monkeypatch):
    """The answers are the same, and so they are with compiled decoding."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    questions = ["--prompt", "What is this?", "--prompt", "And now?", "--json"]
    found = []
    for more in ([], ["--no-reuse"], ["--compile"]):
        assert ask(bundle, *questions, *more) == 0
        found.append([answer["ids"] for answer in json.loads(capsys.readouterr().out)["answers"]])
    assert found[0] == found[1] == found[2]


def test_the_language_model_may_be_spread(bundle, tmp_path, capsys):
    """By a file and as it fits, also with the checkpoint's own tower, which stays whole: the answers are the same."""
    places = tmp_path / "map.json"
    places.write_text(json.dumps({"": "cpu", "model.layers.2": "disk", "lm_head": "disk"}))
    folder = tmp_path / "offload"
    found = []
    for more in ([], ["--device-map", str(places), "--offload-folder", str(folder)], ["--device-map", "auto"],
                 ["--device-map", str(places), "--offload-folder", str(folder), "--engine", "torch"]):
        assert ask(bundle, "--prompt", "What is this?", "--prompt", "And now?", "--json", *more) == 0
        found.append([answer["ids"] for answer in json.loads(capsys.readouterr().out)["answers"]])
    assert all(ids == found[0] for ids in found)
    gc.collect()
    assert not list(folder.iterdir()), "what lay on disk goes with the model"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no device map, auto or a JSON file"),
        ('{"model": "cpu"}', "the device map has no device for lm_head"),
        ('{"": "disk"}', "and no offload folder was given: name a directory with --offload-folder"),
        ('{"": 99}', "the device map names card 99"),
    ],
)
def test_a_device_map_that_does_not_fit_is_one_sentence(bundle, content, said, tmp_path, capsys):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    assert ask(bundle, "--prompt", "What?", "--device-map", str(path)) == 1
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_explain_draws_a_picture(bundle, tmp_path, capsys):
    path = tmp_path / "kept.png"
    assert ask(bundle, "--prompt", "What is this?", "--explain", str(path)) == 0
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 400


def test_sampling_is_repeatable_and_inner_merging_can_be_left_out(bundle, capsys):
    def ids(*more):
        assert ask(bundle, "--prompt", "What is this?", "--json", *more) == 0
        return json.loads(capsys.readouterr().out)["answers"][0]["ids"]

    sampled = ids("--sample", "--temperature", "1.5", "--seed", "3")
    assert sampled == ids("--sample", "--temperature", "1.5", "--seed", "3")
    assert sampled != ids("--sample", "--temperature", "1.5", "--seed", "4")
    assert len(ids("--no-inner")) >= 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give --prompt"),
        (["--prompt", "a", "--max-new-tokens", "0"], "0 is too small, at least 1 fits"),
        (["--prompt", "a", "--threads", "two"], "'two' is not a whole number"),
        (["--prompt", "a", "--engine", "magic"], "invalid choice: 'magic'"),
        (["--prompt", "a", "--temperature", "0.5"], "--temperature goes with --sample"),
        (["--prompt", "a", "--sample", "--temperature", "0"], "'0' is not a number above 0"),
        (["--prompt", "a", "--sample", "--temperature", "-1"], "'-1' is not a number above 0"),
        (["--prompt", "a", "--sample", "--temperature", "nan"], "'nan' is not a number above 0"),
        (["--prompt", "a", "--sample", "--temperature", "inf"], "'inf' is not a number above 0"),
        (["--prompt", "a", "--frame-budgets", "data"], "goes with --engine torch"),
        (["--prompt", "a", "--offload-folder", "x"], "--offload-folder goes with --device-map"),
        (["--prompt", "a", "--compile", "--device-map", "auto"], "--compile does not go with --device-map"),
        (["--promp", "a"], "--promp"),
    ],
)
def test_usage_errors_are_told(more, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--bundle", "nowhere", "--video", VIDEO, *more])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_engine_is_one_short_line_and_the_rest_on_demand(bundle, capsys):
    assert ask(bundle, "--prompt", "What is this?", "--max-new-tokens", "1") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("engine: ")]
    assert "onnxruntime" in line and "--verbose says why" in line and len(line) < 150
    assert ask(bundle, "--prompt", "What is this?", "--max-new-tokens", "1", "--verbose") == 0
    assert "not tensorrt-rtx: the bundle" in capsys.readouterr().err


def test_a_short_video_is_answered_and_strictly_refused(bundle, tmp_path, capsys):
    """8 frames are needed; a picture is a video of one."""
    path = tmp_path / "picture.png"
    Image.fromarray(read_frames(VIDEO, frames=1).frames[0]).save(path)
    command = ["--bundle", bundle, "--video", str(path), "--prompt", "What?", "--max-new-tokens", "2"]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "7 are repeats" in told and "8 of 1 frames, 7 of them repeats," in told
    assert main([*command, "--strict-frames"]) == 1
    assert "8 are needed" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    missing = tmp_path / "no" / "kept.png"
    argv = ["--bundle", "nowhere", "--video", "nothing.mp4", "--prompt", "a", "--explain", str(missing)]
    assert main(argv) == 1
    assert str(missing) in capsys.readouterr().err


def test_frame_counts_can_follow_the_data(bundle, tmp_path, capsys):
    path = tmp_path / "kept.png"
    more = ("--engine", "torch", "--frame-budgets", "data", "--explain", str(path))
    assert ask(bundle, "--prompt", "What is this?", "--json", *more) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["engine"] == "torch" and path.stat().st_size > 0
    model = load(small_demo())
    config = read_bundle(bundle).manifest.config
    tokens = encode_video(
        model, torch.from_numpy(read_frames(VIDEO, frames=8, size=196).frames), retain_ratio=config.retain,
        tau=config.tau, max_window=config.max_window, ema=config.ema, merge_layers=config.merge_layers,
    )
    prompt = build_prompt(model.tokenizer, "What is this?")
    expected = generate(model, prompt, tokens, inner=config.inner, max_new_tokens=8)
    assert result["answers"][0]["ids"] == expected.tolist(), "the released method's own tokens"


def test_the_front_door_in_python(bundle):
    """What the README shows, and that what cannot be is refused before the weights are read."""
    with engines.open_pipeline(bundle, engine="onnxruntime", threads=1) as pipeline:
        answer = pipeline.ask(VIDEO, "What is this?", max_new_tokens=3)
        assert 1 <= len(answer.ids) <= 3 and answer.text
    with pytest.raises(EngineError, match="closed"):
        pipeline.encode(torch.zeros(8, 196, 196, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "magic"}, "no engine 'magic'"),
        ({"engine": "tensorrt-rtx"}, "holds no tensorrt-rtx engine"),
        ({"frame_budgets": "data"}, "need engine torch"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"device": "cuda:99"}, "cuda:99 is not here"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"checkpoint": "demo"}, "other weights"),
        ({"device_map": "auto", "compile": True}, "compiled decoding does not go with a device map"),
        ({"device_map": {"": "disk"}}, "no offload folder"),
        ({"offload_folder": "x"}, "goes with a device map"),
    ],
)
def test_what_cannot_be_is_refused_before_the_weights_are_read(bundle, options, said, monkeypatch):
    monkeypatch.setattr("earlytom.checkpoint.loader.read_tensors", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(EarlyTomError, match=said):
        engines.open_pipeline(bundle, **options)
