"""`scripts/gpu_check.py` and `scripts/bench.py` on a CPU: complete, within the time, whole however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from earlytom.errors import ConfigError, EngineError
from engines.measure import machine
from engines.measure.timing import Timing, compare_times, matrix_rate
from engines.pytorch import TorchRunner
from scripts import bench as bench_script
from scripts.gpu_check import __main__ as script
from scripts.gpu_check import steps as gpu_steps
from scripts.gpu_check.engines import Engines
from scripts.gpu_check.journal import SCHEMA, Clock, Journal, OutOfTime, Skip, Step
from scripts.gpu_check.report import render, summarise
from scripts.gpu_check.run import CheckOptions, _one, run_check
from scripts.gpu_check.workshop import Variant, Workshop, random_vision
from tests.bundles import small_bundle
from tests.engines.bundle.test_bundle import make_engine

ROOT = Path(__file__).parents[2]


def step(name: str, run: Callable[[], Any], seconds: float = 0.0) -> Step:
    return Step(name, f"what {name} does", lambda: seconds, run)


def failing(error: BaseException) -> Callable[[], Any]:
    def run() -> Any:
        raise error

    return run


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run these steps in place of the real ones."""

    def run(*steps: Step, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(gpu_steps, "all_steps", lambda *_: list(steps))
        run_check(CheckOptions(output=tmp_path / "out.json", **options))
        found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
        assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
        return found

    return run


def status(content: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in content["steps"]}


# ---- the run


def test_every_end_of_a_step_is_noted(check: Callable[..., dict[str, Any]]) -> None:
    content = check(
        step("good", lambda: {"x": 1}), step("away", failing(Skip("no card", {"built": 2}))),
        step("ours", failing(EngineError("it refuses"))), step("theirs", failing(RuntimeError("CUDA\nerror"))),
        step("missing", failing(ImportError("no", name="onnx"))), step("late", failing(OutOfTime("the time was up"))),
        step("long", dict, seconds=9999), step("last", lambda: {"y": 2}),
    )
    assert status(content) == {
        "good": "done", "away": "skipped", "ours": "failed", "theirs": "failed", "missing": "skipped",
        "late": "skipped", "long": "skipped", "last": "done",
    }
    by_name = {entry["name"]: entry for entry in content["steps"]}
    assert by_name["good"]["result"] == {"x": 1} and by_name["away"]["result"] == {"built": 2}
    assert by_name["theirs"]["reason"] == "RuntimeError: CUDA"
    assert by_name["missing"]["reason"] == "the package onnx is not here"
    assert by_name["long"]["reason"].startswith("needs about 9999 s and ")
    assert content["finished"] and content["interrupted"] is None and content["schema"] == 1
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert set(content["summary"]["left_out"]) == set(by_name) - {"good", "last"}


@pytest.mark.parametrize(("error", "word"), [(KeyboardInterrupt(), "Ctrl-C"), (SystemExit(143), "a signal")])
def test_an_end_from_outside_keeps_what_was_measured(
    check: Callable[..., dict[str, Any]], error: BaseException, word: str
) -> None:
    content = check(step("one", lambda: {"x": 1}), step("two", failing(error)), step("three", dict))
    assert status(content) == {"one": "done", "two": "interrupted", "three": "skipped"}
    assert content["interrupted"] == word and content["steps"][0]["result"] == {"x": 1}


def test_the_file_is_whole_during_every_step(check: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    seen = []

    def look() -> dict[str, Any]:
        seen.append(json.loads((tmp_path / "out.json").read_text()))
        return {}

    check(step("one", look), step("two", look))
    assert [status(content) for content in seen] == [{"one": "running"}, {"one": "done", "two": "running"}]
    assert not seen[0]["finished"] and "ended during this step" in seen[0]["steps"][0]["reason"]


def test_a_step_is_ended_when_the_time_is_up(check: Callable[..., dict[str, Any]]) -> None:
    start = time.monotonic()
    content = check(step("endless", lambda: time.sleep(60)), step("next", dict, seconds=1), minutes=1 / 60)
    assert time.monotonic() - start < 30, "half of what the step would take"
    assert status(content) == {"endless": "skipped", "next": "skipped"}
    assert content["steps"][0]["reason"] == "the time was up"


def test_time_runs_out_inside_of_long_work() -> None:
    clock = Clock(1e-9)
    with pytest.raises(OutOfTime, match="up at: build"):
        clock.check("build")


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for wrong in ({"minutes": 0}, {"dtypes": ("int8",)}, {"dtypes": ()}):
        with pytest.raises(ConfigError):
            CheckOptions(output=tmp_path / "x", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no step nothing: the steps are matrix rate, torch fp16 24"):
        run_check(CheckOptions(output=tmp_path / "x", quick=True, steps=("nothing",)))


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    with pytest.raises(EngineError, match="cannot be written"):
        Journal(tmp_path / "dir", {}).write()
    assert os.listdir(tmp_path) == ["dir"]


# ---- the real steps


def test_it_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    steps = "matrix,torch fp16,tensorrt fp16,oracle,memory"
    assert script.main(["--quick", "--output", str(output), "--dtype", "fp16", "--steps", steps]) == 0
    content = json.loads(output.read_text())
    found = status(content)
    assert found["matrix rate"] == found["torch fp16 24"] == found["oracle"] == "done"
    if not torch.cuda.is_available():
        assert found["tensorrt fp16 24"] == found["memory"] == "skipped"
        assert "no CUDA device" in capsys.readouterr().out
    result = next(entry["result"] for entry in content["steps"] if entry["name"] == "torch fp16 24")
    assert result["parity"][0]["passed"] and result["parity"][0]["cosine"] > 0.999
    assert set(result["times"]) == {gpu_steps.EAGER, gpu_steps.FULL, gpu_steps.PRUNED}
    assert content["command"][0] == "gpu_check" and content["quick"] and content["finished"]


def test_every_step_of_a_card_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that need a card, with PyTorch in the place of engines and of the card."""
    shop = Workshop(tmp_path, torch.device("cpu"), quick=True)
    journal = Journal(tmp_path / "out.json", {"quick": False, "clocks": {}, "machine": machine.describe_machine()})

    def runner(variant: Variant, engine: str, *, cuda_graph: bool = True) -> Any:
        key = (variant, engine, cuda_graph)
        if key not in shop.runners:
            vision = shop.vision(variant.dtype, variant.width)
            shop.runners[key] = TorchRunner(vision, shop.config_of(variant))
        return shop.runners[key]

    def build(variant: Variant, product: str, **options: Any) -> tuple[Any, float]:
        return make_engine(f"{variant.name}.engine", product=product), 1.0 if "timing" in journal.content else 4.0

    monkeypatch.setattr(gpu_steps, "MEMORY_RUNS", 60)
    monkeypatch.setattr(shop, "runner", runner)
    monkeypatch.setattr(shop, "build", build)
    monkeypatch.setattr(Engines, "built", lambda self, product, variant: build(variant, product))
    monkeypatch.setattr(Engines, "opened", lambda self, product, variant, record: runner(variant, product))
    monkeypatch.setattr(Engines, "facts", lambda self, variant, record: {})
    monkeypatch.setattr(Engines, "kernels", lambda self, product, variant: {"fused": 3})
    stream: Any = SimpleNamespace(synchronize=lambda: None)
    for name, value in {
        "synchronize": lambda device=None: None, "mem_get_info": lambda device=None: (100, 200),
        "Stream": lambda: stream, "stream": nullcontext, "current_stream": lambda: stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for one in gpu_steps.all_steps(shop, journal, Clock(5), ("fp16",)):
        if one.name == "demo":
            continue
        if one.name == "rebuild":
            journal.content["timing"] = True
        assert one.seconds() > 0
        journal.note(one, "done", result=one.run())
    results = {entry["name"]: entry["result"] for entry in journal.steps}
    assert results["graph"]["bit_equal"] and results["graph"]["threads_equal"]
    assert results["memory"] == {"engine": "tensorrt", "runs": 60, "growth_bytes": 0}
    assert results["rebuild"]["speedup"] == 4
    assert results["unpruned"]["speedup"] > 0 and results["attention"]["kernels"] == {"fused": 3}
    assert {hop["actual"] for hop in results["onnxruntime"]["parity"]} >= {"onnxruntime", "tensorrt", "tensorrt-rtx"}
    journal.content |= {"summary": summarise(journal), "seconds": 1.0}
    text = render(journal.content)
    verdicts = {v["what"]: v["passed"] for v in journal.content["summary"]["verdicts"]}
    assert verdicts["replay of the CUDA graph is bit-equal to plain execution"]
    assert verdicts["growth of device memory over 60 runs, bytes"]
    assert verdicts["first token of the demo is equal between engines"] is None
    assert all(v is not False for what, v in verdicts.items() if "tolerances" in what), text
    shop.close()


@pytest.mark.slow
@pytest.mark.trt
def test_all_of_it_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert script.main(["--quick", "--output", str(output)]) == 0
    found = status(json.loads(output.read_text()))
    assert found["demo"] == found["onnxruntime"] == "done"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_can_be_ended_at_any_time(tmp_path: Path, how: signal.Signals) -> None:
    output = tmp_path / "gpu.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.gpu_check", "--quick", "--output", str(output), "--work", str(tmp_path / "w")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    try:
        end = time.monotonic() + 300  # a busy machine takes a minute to import torch
        while time.monotonic() < end and process.poll() is None:
            if output.exists() and "done" in status(json.loads(output.read_text())).values():
                break
            time.sleep(0.05)
        process.send_signal(how)
        process.communicate(timeout=120)
    finally:
        process.kill()
    content = json.loads(output.read_text())
    assert content["steps"][0]["status"] == "done" and content["steps"][0]["result"]["tflops"]["fp16"] > 0
    if how is signal.SIGKILL:
        assert not content["finished"]
        return
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how]
    assert content["finished"] and content["interrupted"] and content["summary"]["left_out"]
    assert not list((tmp_path / "w").iterdir())


def test_it_needs_little_more_than_torch(tmp_path: Path) -> None:
    """As on a box that has a checkout, torch and nothing of ours installed."""
    gone = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "transformers",
            "av", "safetensors", "tokenizers", "huggingface_hub")
    program = (
        "import sys, importlib.metadata as m\n"
        f"for name in {gone!r}: sys.modules[name] = None\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'earlytom-export': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from scripts.gpu_check.__main__ import main\n"
        "sys.exit(main(['--quick', '--dtype', 'fp16', '--output', sys.argv[1]]))"
    )
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-c", program, str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = status(json.loads(output.read_text()))
    assert {name for name, how in found.items() if how == "done"} == {"matrix rate", "torch fp16 24", "oracle"}
    assert set(found.values()) == {"done", "skipped"}


# ---- times, machine, bench


def test_calls_are_timed_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = compare_times(calls, runs=3, warm_up=1)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert len(times.rounds["a"]) == len(times.rounds["b"]) == 3
    assert len(compare_times(calls, runs=10**6, seconds=0).rounds["a"]) == 1
    found = Timing.of([3.0, 1.0, 2.0])
    assert found == Timing(2.0, 1.0, 3.0, 3) and str(found) == "2.00 ms (1.00-3.00, 3 runs)"
    times = type(times)({"slow": [4.0, 9.0, 8.0], "fast": [2.0, 3.0, 1.0]})
    assert times.ratio("slow", "fast") == 3
    assert matrix_rate("cpu", torch.float32, size=32, runs=1) > 0


def test_random_weights_are_the_same_every_time() -> None:
    shop = Workshop(Path("/nowhere"), torch.device("cpu"), quick=True)
    first, second = (random_vision(shop.geometry(24), "cpu").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert shop.clip.shape == (1, 12, 84, 84, 3) and shop.clip.dtype == torch.uint8


def test_a_machine_without_a_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "current_card", lambda index=0: None)
    found = machine.describe_machine()
    assert found["card"] is None and json.dumps(found)
    assert machine.clocks() == {} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    uuids = ["4e1f2a", "9b7c03"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.extend(command)
        return SimpleNamespace(stdout="1755, 610\n")

    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.clocks("clocks.sm", "clocks.mem") == {"sm_mhz": "1755", "memory_mhz": "610"}
    assert "--id=GPU-9b7c03" in asked, "nvidia-smi numbers cards in another order than CUDA"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "_card_name", lambda: "GPU-9b7c03")
    monkeypatch.setenv("PATH", "")
    assert machine.clocks() == {}


@pytest.mark.slow  # what it prints is tested in engines/test_bench.py
def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = small_bundle()
    output = tmp_path / "bench.json"
    arguments = ["--bundle", str(bundle.path), "--runs", "2", "--output", str(output)]
    assert bench_script.main(arguments) == 0
    text, found = capsys.readouterr().out, json.loads(output.read_text())
    (row,) = found["rows"]
    assert row["name"] == "onnxruntime" and row["speedup"] == 1 and row["ttft"]["runs"] == 2
    assert {entry["name"] for entry in found["not_run"]} == {"tensorrt", "tensorrt-rtx"} and ": not run: " in text
    assert bench_script.main([*arguments[:4], "--json", "--engines", "onnxruntime"]) == 0
    assert json.loads(capsys.readouterr().out)["not_run"] == []
    assert bench_script.main([*arguments[:2], "--engines", "tensorrt"]) == 1
    assert "bench: error: nothing could be measured: tensorrt: " in capsys.readouterr().err
    passed: list[list[str]] = []
    monkeypatch.setattr(bench_script, "bench", lambda options: passed.append(options) or 0)
    arguments += ["--checkpoint", "demo", "--device", "cpu"]
    assert bench_script.main([*arguments, "--engines", "onnxruntime,torch"]) == 0
    (options,) = passed
    assert options[options.index("--contestants") + 1] == "onnxruntime,static"
    assert options[options.index("--checkpoint") + 1] == "demo" and options[options.index("--device") + 1] == "cpu"
    assert SCHEMA == 1


def test_a_signal_that_a_library_made_an_error_of_ends_the_run(tmp_path: Path) -> None:
    def run() -> dict[str, Any]:
        clock.ended = True  # as the signal's handler does
        raise RuntimeError("while compiling: SystemExit 143")

    clock, journal = Clock(1.0), Journal(tmp_path / "gpu.json", {})
    with pytest.raises(SystemExit, match="143"):
        _one(Step("compiles", "something", lambda: 0.0, run), journal, clock)
    assert journal.steps[0]["status"] == "interrupted"
