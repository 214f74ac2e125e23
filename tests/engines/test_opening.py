"""Choosing an engine: which this machine can run, the best of a bundle with the reason, and what the others lack."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from earlytom.errors import BundleError, ConfigError, EngineError, InputError
from earlytom.tower import StaticTower
from earlytom.vision.siglip import Vision
from engines import opening as module
from engines.bundle.manifest import TensorSpec
from engines.bundle.reader import Bundle
from engines.bundle.writer import BundleWriter, update_bundle
from engines.opening import ENGINES, available_engines, open_runner
from engines.pytorch import TorchRunner
from engines.runner import Closing, check_inputs, dtype_name
from tests.engines.bundle.test_bundle import CONFIG, GEOMETRY, make_engine, make_manifest
from tests.engines.test_onnxruntime import stand_in

FRAMES = torch.randint(0, 256, (1, 8, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vision() -> Vision:
    torch.manual_seed(0)
    return Vision(GEOMETRY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the tiny tower with a stand-in for its graph."""
    with BundleWriter(tmp_path_factory.mktemp("bundle") / "b") as writer:
        stand_in(writer.path / "vision.onnx")
        return writer.commit(make_manifest())


class FakeRunner(Closing):
    """What engines/tensorrt_run.py will give."""

    name, thread_safe, inputs, outputs = "fake", False, (), ()

    def __init__(self, why: str) -> None:
        self.why = why

    def close(self) -> None:
        self.why = "closed"


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """An installed TensorRT that runs engines for SM80 only."""
    fake = types.ModuleType("engines.tensorrt.runner")

    def open_bundle(name: str, bundle: Bundle, options: Any) -> FakeRunner:
        if any("sm80" in engine.targets for engine in bundle.manifest.engines):
            return FakeRunner(f"{name} on a fake A100")
        raise EngineError("this card is SM80, the bundle's engines are for SM89")

    fake.probe, fake.open_bundle = lambda name: f"{name} 11.2", open_bundle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "engines.tensorrt.runner", fake)
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    yield fake


def refusal(call: Any, kind: type[Exception] = EngineError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- inputs

SPECS = (TensorSpec("a", "uint8", (2, 3)), TensorSpec("b", "bfloat16", (1,)))
RIGHT = {"a": np.zeros((2, 3), np.uint8), "b": torch.zeros(1, dtype=torch.bfloat16)}


def test_right_inputs_pass() -> None:
    check_inputs(SPECS, RIGHT)
    check_inputs((), {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a": np.zeros((3, 2), np.uint8)}, "a uint8 [3, 2]"),
        ({"a": torch.zeros(2, 3)}, "a float32 [2, 3]"),
        ({"a": np.zeros((2, 3), np.int8)}, "a int8 [2, 3]"),
        ({"a": [[1]]}, "a as a list"),
        ({"a": None}, "no a"),
        ({"c": np.zeros(1)}, "an input c that it does not have"),
        ({"a": torch.zeros(()), "b": None, "x": 1}, "an input x that it does not have, a float32 [], no b"),
    ],
)
def test_wrong_inputs_are_all_named(change: dict[str, Any], expected: str) -> None:
    text = refusal(lambda: check_inputs(SPECS, RIGHT | change), InputError)
    assert text == f"the engine takes a uint8 [2, 3]; b bfloat16 [1] and was given {expected}"


def test_dtype_names_are_the_same_for_numpy_and_torch() -> None:
    for name in ("uint8", "int64", "bool", "float16", "float32"):
        assert dtype_name(np.zeros(1, name)) == dtype_name(torch.zeros(1, dtype=getattr(torch, name))) == name


# ---- torch


def test_the_torch_engine_is_the_tower(vision: Vision) -> None:
    with TorchRunner(vision, CONFIG) as runner:
        assert isinstance(runner, TorchRunner) and runner.thread_safe
        expected = StaticTower(vision, CONFIG)(FRAMES)
        for frames in (FRAMES, FRAMES.numpy()):
            outputs = runner.run(frames)
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
        for spec, value in zip(runner.outputs, outputs):
            assert spec == TensorSpec(spec.name, dtype_name(value), tuple(value.shape))
        assert not outputs.tokens.requires_grad
        refusal(lambda: runner.run(FRAMES[0]), InputError)
    assert "was closed" in refusal(lambda: runner.run(FRAMES))


def test_the_torch_engine_takes_what_the_tower_takes(vision: Vision) -> None:
    assert TorchRunner(vision, CONFIG, batch=2).inputs[0].shape[0] == 2
    with pytest.raises(ConfigError):
        TorchRunner(vision, CONFIG.replace(newline="grid"))


def test_read_only_frames_are_taken_without_a_warning(vision: Vision, recwarn: pytest.WarningsRecorder) -> None:
    frames = FRAMES.numpy().copy()
    frames.setflags(write=False)
    torch.set_warn_always(True)  # else torch warns once a process, and whether here depends on the tests before
    try:
        TorchRunner(vision, CONFIG).run(frames)
    finally:
        torch.set_warn_always(False)
    said = [str(warning.message) for warning in recwarn]
    assert not [text for text in said if "writ" in text], said


# ---- choosing


def test_auto_takes_the_best_and_says_why(bundle: Bundle, vision: Vision) -> None:
    with open_runner(bundle.path, threads=1) as runner, open_runner(bundle, "torch", vision=vision) as torch_runner:
        assert runner.name == "onnxruntime"
        assert runner.why == "onnxruntime, CPU: the best that this machine can run"
        assert [line.split(":")[0] for line in runner.passed] == ["tensorrt", "tensorrt-rtx"]
        assert runner.passed[1].endswith(f"earlytom-build {bundle.path} --engine tensorrt-rtx adds one")
        assert torch_runner.why == "torch, float32 on cpu: asked for"
        for left, right in zip(runner.run(FRAMES), torch_runner.run(FRAMES)):
            assert (left.shape, left.dtype) == (right.shape, right.dtype)
    assert open_runner(bundle, "onnxruntime", device="cpu").why == "onnxruntime, CPU: asked for"


def test_a_card_that_runs_the_engine_comes_first(bundle: Bundle, tensorrt: types.ModuleType, tmp_path: Path) -> None:
    ours = copy_of(bundle, tmp_path)
    engine = update_bundle(ours, add={"vision.sm80.engine": b"x"}, engines=[make_engine("vision.sm80.engine")])
    runner = open_runner(engine)
    assert runner.why == "tensorrt-rtx on a fake A100: the best that this machine can run"
    assert len(runner.passed) == 1 and runner.passed[0].startswith(f"tensorrt: the bundle {engine.path} holds no")
    assert "holds no tensorrt engine" in refusal(lambda: open_runner(engine, "tensorrt"))


def test_an_engine_for_another_card_is_passed_over_with_the_reason(
    bundle: Bundle, tensorrt: types.ModuleType, tmp_path: Path
) -> None:
    other = update_bundle(
        copy_of(bundle, tmp_path), add={"vision.sm89.engine": b"x"},
        engines=[make_engine("vision.sm89.engine", product="tensorrt", targets=("sm89",))],
    )
    runner = open_runner(other)
    assert runner.name == "onnxruntime"
    assert "tensorrt: this card is SM80, the bundle's engines are for SM89" in runner.passed
    assert refusal(lambda: open_runner(other, "tensorrt")) == "this card is SM80, the bundle's engines are for SM89"


def copy_of(bundle: Bundle, tmp_path: Path) -> Bundle:
    with BundleWriter(tmp_path / "copy") as writer:
        for name in bundle.manifest.files:
            (writer.path / name).write_bytes(bundle.file(name).read_bytes())
        return writer.commit(bundle.manifest)


def test_a_bundle_that_nothing_here_can_run(tmp_path: Path, vision: Vision, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "tensorrt", "tensorrt_rtx")
    with BundleWriter(tmp_path / "b") as writer:
        (writer.path / "vision.sm80.rtx.engine").write_bytes(b"x")
        bundle = writer.commit(make_manifest(engines=(make_engine(),)))
    text = refusal(lambda: open_runner(bundle))
    assert text.startswith(f"this machine cannot run the bundle {bundle.path}: tensorrt: ")
    assert "pip install tensorrt-rtx" in text and "holds no vision.onnx" in text
    assert open_runner(bundle, vision=vision).name == "torch"  # who has the weights has the last resort


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name in packages else real(name)
    )


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_without_its_package(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hide(monkeypatch, "tensorrt", "tensorrt_rtx")
    engine = make_engine("e.engine", product=name)
    other = update_bundle(copy_of(bundle, tmp_path), add={"e.engine": b"x"}, engines=[engine])
    text = refusal(lambda: open_runner(other, name))
    assert f"the engine {name} needs the package" in text and text.endswith(f"pip install {name}")


def test_an_engine_whose_package_is_broken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    assert "cannot be imported: libfoo.so.1" in refusal(lambda: open_runner(bundle, "onnxruntime"))


def test_an_error_of_an_engine_is_one_sentence(
    bundle: Bundle, tensorrt: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA error 35\nat line 7")

    monkeypatch.setattr(tensorrt, "open_bundle", failing)
    engine = update_bundle(copy_of(bundle, tmp_path), add={"e.engine": b"x"}, engines=[make_engine("e.engine")])
    assert refusal(lambda: open_runner(engine, "tensorrt-rtx")).endswith("CUDA error 35")


def test_requests_that_cannot_be(bundle: Bundle, vision: Vision, tmp_path: Path) -> None:
    assert "must be one of auto, tensorrt" in refusal(lambda: open_runner(bundle, "openvino"))
    assert "give the checkpoint demo" in refusal(lambda: open_runner(bundle, "torch"))
    assert "does not exist" in refusal(lambda: open_runner(tmp_path / "none"), BundleError)
    other = copy_of(bundle, tmp_path)
    object.__setattr__(other.manifest, "geometry", make_manifest().geometry.__class__())
    assert "their sizes differ" in refusal(lambda: open_runner(other, "torch", vision=vision))
    (tmp_path / "copy" / "vision.onnx").write_bytes(b"")
    assert "damaged" in refusal(lambda: open_runner(tmp_path / "copy"), BundleError)


# ---- what there is


def test_what_this_machine_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "tensorrt", "tensorrt_rtx")
    report = {found.name: found for found in available_engines()}
    assert list(report) == list(ENGINES)
    assert report["onnxruntime"].available and "with CPU" in report["onnxruntime"].detail
    assert report["torch"].available
    assert not report["tensorrt"].available and report["tensorrt"].detail.endswith("pip install tensorrt")


def test_importing_engines_is_lean() -> None:
    names = ("onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy")
    program = (
        "import json, sys, engines.runner, engines.onnxruntime, engines.opening, engines.bundle.writer\n"
        f"print(json.dumps([name for name in {names!r} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert json.loads(done.stdout) == []
