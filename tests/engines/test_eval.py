"""`earlytom-eval`: rows and tables from the command line, answers kept and taken up again, refusals in one sentence."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import earlytom.demo.evaluate as evaluation
from engines.eval import main
from tests.shared import demo_bundle, small_demo

QUICK = ["--suite", "demo", "--questions", "3", "--frames", "4", "--retain", ".25", "--threads", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Random weights do not stop: their answers are cut short."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(evaluation, "evaluate", partial(evaluation.evaluate, max_new_tokens=3))
    yield
    torch.set_num_threads(threads)


def evaluate(*arguments: object) -> int:
    return main([*QUICK, "--checkpoint", str(small_demo()), *map(str, arguments)])


def test_a_table_and_json_of_the_methods(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert evaluate("--methods", "full,released,static,random", "--inner", "both", "--json", tmp_path / "a.json") == 0
    said = capsys.readouterr()
    content = json.loads((tmp_path / "a.json").read_text())
    names = [row["name"] for row in content["rows"]]
    assert names == ["full", "full inner", "released r=0.25", "released r=0.25 inner", "static r=0.25",
                     "static r=0.25 inner", "random r=0.25"]
    assert all(f"| {name} " in said.out for name in names) and "static r=0.25 − released r=0.25" in said.out
    assert "3 questions (choice)" in said.out and "clip" in said.err
    assert [len(row["answers"]) for row in content["rows"]] == [3] * 7
    assert content["rows"][0]["tokens"] == 4 * 49 + 1
    assert content["suite"]["frames"] == 4 and content["checkpoint"]["digest"]


def test_answers_are_kept_and_taken_up_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "answers.jsonl"
    arguments = ("--methods", "full,first", "--output", kept, "--json")
    assert evaluate(*arguments) == 0
    first = json.loads(capsys.readouterr().out)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-20])  # as a crash leaves it
    asked: list[str] = []
    answer = evaluation.answer
    monkeypatch.setattr(evaluation, "answer", lambda *given: asked.append("one row of a clip") or answer(*given))
    assert evaluate(*arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert len(asked) == 1 and [row["answers"] for row in again["rows"]] == [row["answers"] for row in first["rows"]]
    assert evaluate(*arguments) == 0 and len(asked) == 1
    capsys.readouterr()
    assert evaluate(*arguments, "--seed", "1") == 1
    assert "another evaluation" in capsys.readouterr().err
    kept.write_text("something else\n")
    assert evaluate(*arguments) == 1 and "no file of answers" in capsys.readouterr().err


def test_engines_of_a_bundle_are_rows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "demo", "--questions", "2", "--methods", "static", "--retain", ".25", "--inner", "on"]
    assert main([*arguments, "--bundle", str(demo_bundle()), "--engine", "onnxruntime,torch", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["static r=0.25 inner", "onnxruntime fp32 r=0.25 inner", "torch fp32 r=0.25 inner"]
    assert content["suite"]["frames"] == 8 and rows["torch fp32 r=0.25 inner"]["inner"]["layer"] == 3
    assert len({row["tokens"] for row in rows.values()}) == 1
    ids = [[answer["ids"] for answer in row["answers"]] for row in content["rows"]]
    assert ids[1] == ids[2]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--suite", "mvbench"], ["--suite", "demo", "--engine", "torch"], ["--suite", "demo", "--methods", "best"],
     ["--suite", "demo", "--retain", "0"], ["--suite", "demo", "--retain", "a"],
     ["--suite", "demo", "--questions", "0"], ["--suite", "demo", "--bundle", "b", "--engine", "cuda"]],
)
def test_options_that_do_not_fit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "/nowhere/at/all"], "no checkpoint"),
        (["--bundle", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--plot", "picture.gif"], ".png or .svg"),
        (["--plot", "/nowhere/at/all.png"], "no directory"),
        (["--json", "/proc/at/all.json"], "the directory of the JSON /proc/at cannot be written to"),
        (["--output", "/nowhere/at/all.jsonl", "--methods", "full"], "/nowhere/at/all.jsonl"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*arguments) == 1
    told = capsys.readouterr()
    assert said in told.err and "Traceback" not in told.err and not told.out
    assert told.err.splitlines()[-1].startswith("earlytom-eval: error: ")


def test_a_plot_needs_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluate("--plot", "picture.svg") == 1
    assert "pip install earlytom-export[plot]" in capsys.readouterr().err


def test_clips_are_as_long_as_the_bundle_wants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--bundle", str(demo_bundle())]) == 1
    assert "8 by the bundle" in (told := capsys.readouterr().err) and "4 by --frames" in told
