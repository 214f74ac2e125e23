"""scripts/eval.sh runs what it should: the published preset of each benchmark at each ratio, as lmms-eval takes it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from earlytom.presets import PRESETS, RATIOS
from engines.lmms.arguments import ModelArguments, parse_arguments
from engines.lmms.results import BENCHMARKS

SCRIPT = Path(__file__).parents[2] / "scripts" / "eval.sh"


def run(*words: str, path: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """With the commands of `path`, where it is given, before all others."""
    found = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(
        ["bash", str(SCRIPT), *words], env={"PATH": found, **environ}, capture_output=True, text=True, check=False
    )


def planned(*words: str, **environ: str) -> list[tuple[str, ModelArguments, str]]:
    """Task, arguments and output of each run."""
    done = run("--dry-run", *words, **environ)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    option = [{word: line[at + 1] for at, word in enumerate(line[:-1]) if word.startswith("--")} for line in lines]
    assert all(values["--model"] == "earlytom" for values in option)
    return [(v["--tasks"], parse_arguments(v["--model_args"]), v["--output_path"]) for v in option]


def test_every_benchmark_at_every_ratio_and_unpruned() -> None:
    runs = planned("ov7b", "out")
    assert len({output for *_, output in runs}) == len(runs) == len(PRESETS) * (len(RATIOS) + 1)
    for name in PRESETS:
        own = [(task, arguments) for task, arguments, output in runs if output.startswith(f"out/{name}/")]
        (task,) = {task for task, _ in own}
        (benchmark,) = [b for b in BENCHMARKS if b.task.removesuffix("_") == task]
        assert benchmark.title.lower() == name
        assert {arguments.retain for _, arguments in own} == {1, *RATIOS}
        for _, arguments in own:
            assert arguments.checkpoint == "ov7b" and arguments.frame_budgets is None
            pruned = (name, "as-released")
            assert (arguments.preset, arguments.inner) == ((None, "on") if arguments.unpruned else pruned)


def test_ratios_benchmarks_and_arguments_can_be_chosen() -> None:
    runs = planned("ov7b", "out", "1.0", "0.2", BENCHMARKS="videomme mvbench", MODEL_ARGS="dtype=fp16")
    assert [(task, arguments.retain) for task, arguments, _ in runs] == [
        ("videomme", 1), ("videomme", 0.2), ("mvbench", 1), ("mvbench", 0.2)
    ]
    assert {arguments.dtype for _, arguments, _ in runs} == {"fp16"}
    assert "accelerate launch --num_processes 4 -m" in run("--dry-run", "c", "out", PROCESSES="4").stdout


@pytest.mark.parametrize(
    ("words", "environ", "status", "told"),
    [
        ((), {}, 2, "usage: "),
        (("c", "out,1"), {}, 2, "a comma in c or out,1"),
        (("c", "out"), {"BENCHMARKS": "imagenet"}, 1, "there is no benchmark imagenet"),
    ],
)
def test_what_does_not_fit_is_told(words: tuple[str, ...], environ: dict[str, str], status: int, told: str) -> None:
    done = run("--dry-run", *words, **environ)
    assert done.returncode == status and told in done.stderr and not done.stdout


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A `python` that leaves results as lmms-eval does, or with FAIL none; an `earlytom-eval` that says its words."""
    home = tmp_path / "bin"
    home.mkdir()
    (home / "python").write_text(
        '#!/usr/bin/env bash\n[[ -z "${FAIL:-}" ]] || exit 0\nwhile (($# > 1)); do\n'
        '  if [[ "$1" == --output_path ]]; then mkdir -p "$2/m"; echo "{}" >"$2/m/x_results.json"; echo ran; fi\n'
        "  shift\ndone\n"
    )
    (home / "earlytom-eval").write_text('#!/usr/bin/env bash\necho "table: $*"\n')
    for file in home.iterdir():
        file.chmod(0o755)
    return home


def test_results_that_are_there_are_not_made_again(commands: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    first = run("c", output, "1", "0.2", path=commands)
    assert first.stdout.splitlines() == ["ran"] * 8 + [f"table: --table {output}"]
    again = run("c", output, "1", "0.2", "0.1", path=commands)
    assert again.stdout.count("ran") == 4 and len(re.findall("is there already", again.stdout)) == 8


def test_a_run_without_results_ends_it(commands: Path, tmp_path: Path) -> None:
    """lmms-eval exits with status 0 after an error too."""
    done = run("c", str(tmp_path / "out"), path=commands, FAIL="1")
    assert done.returncode == 1 and not done.stdout and "no results of mvbench at 1" in done.stderr
