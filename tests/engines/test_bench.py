"""`earlytom-bench` from the command line: files, tables and refusals; its answers are the pipeline's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from earlytom.video.clips import verification_clips
from engines import open_pipeline
from engines.bench import main
from engines.measure.results import Results
from tests import clips
from tests.shared import demo_bundle

TINY = ["--full-size", "tiny", "--frames", "8", "--runs", "1", "--warm-up", "0", "--new-tokens", "2"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_full_size_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"a.{name}" for name in ("json", "md")}
    arguments = [*TINY, "--contestants", "transformers-sdpa,released,static", "--threads", "1"]
    assert main([*arguments, "--output", str(files["json"]), "--markdown", str(files["md"])]) == 0
    said = capsys.readouterr()
    results = Results.read(files["json"])
    assert said.out == files["md"].read_text() and "How many times as fast as transformers-sdpa" in said.out
    assert "round 1: static " in said.err and results.model.startswith("random tiny, 8 frames of 84 x 84")
    assert results.settings.full_size == "tiny" and results.settings.retain == 0.2
    assert [row.name for row in results.rows] == [
        "transformers-sdpa", "released", "released + inner", "static", "static + inner", "static, second question"
    ]
    assert main(["--compare", str(files["json"]), str(files["json"])]) == 0
    assert "| static + inner " in (told := capsys.readouterr().out) and "1.00x" in told and "differ" not in told
    assert main(["--compare", str(files["json"]), str(files["json"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []


def test_a_bundles_answers_are_those_of_its_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    """With inner merging, as the bundle has it, and without; a video is read in every round."""
    bundle, question = demo_bundle(), "What is this?"
    capsys.readouterr()  # what making it said
    arguments = ["--bundle", str(bundle), "--contestants", "static,onnxruntime", "--runs", "1", "--warm-up", "0"]
    assert main([*arguments, "--prompt", question, "--new-tokens", "3", "--json"]) == 0
    results = Results.from_json(capsys.readouterr().out)
    with open_pipeline(bundle, engine="onnxruntime") as pipeline:
        frames, size = pipeline.config.frames, pipeline.model.geometry.image_size
        encoded = pipeline.encode(verification_clips(None, frames=frames, size=size, batch=1)[0])
        for name, inside in (("onnxruntime", False), ("onnxruntime + inner", True)):
            answer = pipeline.ask(encoded, question, max_new_tokens=3, min_new_tokens=3, merge_inside=inside)
            row = results.row(name)
            assert row is not None and row.ids == answer.ids and row.visual_tokens == len(encoded.tokens)
    assert [row.name for row in results.rows if row.contestant == "static"] == [
        "static", "static + inner", "static, second question"
    ]
    assert results.settings.frames == frames and results.settings.retain == pipeline.config.retain
    assert main([*arguments[:2], "--contestants", "onnxruntime", "--vision-only", "--runs", "1", "--warm-up", "0",
                 "--video", str(clips.real("carphone"))]) == 0
    out = capsys.readouterr().out
    assert "decode" in out and "resize" in out and "splice" not in out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--full-size", "70b"], 2, "--full-size is '70b'"), (["--contestants", "best"], 2, "no contestant 'best'"),
        (["--bundle", "b", "--retain", "0.1"], 2, "--retain does not go with --bundle"),
        (["--full-size", "7b", "--checkpoint", "demo"], 2, "does not go with a checkpoint"),
        (["--vision-only", "--contestants", "transformers-eager"], 2, "no part in vision alone"),
        (["--seconds", "soon"], 2, "not a number of seconds"),
        (["--bundle", "nowhere"], 1, "does not exist"), ([*TINY, "--device", "tpu"], 1, "there is no device 'tpu'"),
        ([*TINY, "--retain", "1.5"], 1, "retain is 1.5"), (["--compare", "none", "none"], 1, "none cannot be read"),
        ([*TINY, "--plot", "a.pdf"], 1, "must end in .png or .svg"),
        ([*TINY, "--video", "none.mp4"], 1, "there is no such file"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if status == 2:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    else:
        assert main(arguments) == status
    told = capsys.readouterr()
    assert said in told.err and "Traceback" not in told.err and not told.out
    assert told.err.splitlines()[-1].startswith("earlytom-bench: error: ")


def test_a_bundle_of_another_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--full-size", "tiny", "--bundle", str(demo_bundle())]) == 1
    assert "differ in size" in capsys.readouterr().err


def test_a_plot_needs_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, "--plot", "picture.svg"]) == 1
    assert "pip install earlytom-export[plot]" in capsys.readouterr().err
