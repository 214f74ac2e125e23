"""Engines built with TensorRT for RTX, which needs no GPU: the real builder, small graphs, and graphs to refuse."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from earlytom.errors import ConfigError, EarlyTomError, EngineError
from engines.bundle.manifest import EngineRecord
from engines.tensorrt import build as tensorrt_build
from engines.tensorrt.build import BuildOptions, build_engine, engine_file_name, probe_build
from engines.tensorrt.inspect import inspect_plan
from engines.tensorrt.worker import build
from tests.tensorrt_graphs import GEOMETRY, copy_graph, exported, in_float32, manifest_for, write_graph

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
A100 = BuildOptions(targets=("sm80",))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_a100_engine_with_the_same_bytes_twice(tmp_path: Path) -> None:
    graph, manifest = exported("fp16", 20)
    found, steps = [], list[str]()
    for folder in (tmp_path / "first", tmp_path / "a folder with a longer name"):
        folder.mkdir()
        record = build_engine(graph, manifest, folder, A100, progress=steps.append)
        assert [entry.name for entry in folder.iterdir()] == ["vision.sm80.rtx.engine"] == [record.file]
        found.append(digest(folder / record.file))
    assert found[0] == found[1]
    version = record.version
    assert version.startswith("1.") and record == EngineRecord(
        "vision.sm80.rtx.engine", "tensorrt-rtx", version, ("sm80",), "none", False, None, None, None, A100.settings()
    )
    assert steps[:2] == ["load TensorRT for RTX", "parse"] and steps[-1] == "write"
    assert any(step.endswith(" 50 %") for step in steps) and "Optimizing graph" in steps
    plan = inspect_plan(folder / record.file, manifest)
    assert plan.fused_kernels == ("_gemm_mha_v2",) * 2, "the last merge layer's too"
    assert plan.kernels > 10 and not plan.warnings


def test_one_engine_for_several_cards_from_the_attention_operator_in_bf16(tmp_path: Path) -> None:
    graph, manifest = exported("bf16", 23)
    one = build_engine(graph, manifest, tmp_path, A100)
    several = build_engine(graph, manifest, tmp_path, BuildOptions())
    assert several.file == "vision.sm80-sm86-sm89-sm120-sm121.rtx.engine"
    assert several.targets == ("sm80", "sm86", "sm89", "sm120", "sm121")
    sizes = [(tmp_path / record.file).stat().st_size for record in (one, several)]
    assert sizes[0] < sizes[1] < sizes[0] + 100_000


def children() -> set[int]:
    """Processes of this one, those included that other tests have started and that stay."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # one that has just ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


@pytest.mark.parametrize("how", ["raise", "signal", "error"])
def test_interrupted_it_leaves_nothing_and_ends_at_once(tmp_path: Path, how: str) -> None:
    graph, manifest = exported("fp16", 20)

    start, others = 0.0, children()

    def progress(step: str) -> None:
        nonlocal start
        if step == "Building engine":
            start = time.monotonic()
            if how == "signal":
                signal.raise_signal(signal.SIGINT)
            raise KeyboardInterrupt if how == "raise" else OSError("the terminal is gone")

    with pytest.raises(OSError if how == "error" else KeyboardInterrupt):
        build_engine(graph, manifest, tmp_path, A100, progress=progress)
    assert time.monotonic() - start < 20 and not list(tmp_path.iterdir())
    assert children() == others


def test_interrupted_while_the_builder_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does for most of a build, while it makes kernels."""
    graph, manifest = exported("fp16", 20)
    monkeypatch.setattr(tensorrt_build, "_WORKER", "import time; time.sleep(60)")
    ctrl_c = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    start = time.monotonic()
    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, manifest, tmp_path, A100)
    assert time.monotonic() - start < 20 and not list(tmp_path.iterdir())


def request(graph: Path, manifest: Any, folder: Path, options: BuildOptions = A100) -> dict[str, Any]:
    """What the worker would be sent, so that it can be called here."""
    sent: list[dict[str, Any]] = []

    def keep(message: dict[str, Any], progress: Any) -> dict[str, Any]:
        sent.append(json.loads(json.dumps(message)))
        raise EngineError("kept")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineError, match="kept"):
        patch.setattr(tensorrt_build, "_run_worker", keep)
        build_engine(graph, manifest, folder, options)
    return sent[0]


def refusal(graph: Path, manifest: Any, folder: Path) -> str:
    with pytest.raises(EngineError) as caught:
        build(request(graph, manifest, folder), lambda step: None)
    return str(caught.value)


def test_every_objection_of_the_parser_comes_out_with_node_and_reason(tmp_path: Path) -> None:
    graph = write_graph(
        tmp_path / "vision.onnx",
        helper.make_node("Frobnicate", ["x"], ["a"], name="vision.layers.0/Frobnicate"),
        helper.make_node("Det", ["x"], ["b"], name="tower/Det"),
        helper.make_node("Unique", ["x"], ["c"], name="tower/Unique"),
        helper.make_node("Sum", ["a", "b", "c"], ["y"], name="tower/Sum"),
    )
    said = refusal(graph, exported("fp16", 20).manifest, tmp_path)
    assert f"TensorRT's parser refuses {graph}: 3 objections: " in said
    assert "vision.layers.0/Frobnicate (Frobnicate): neither an operator nor a plugin of that name is known" in said
    assert "tower/Det (Det): TensorRT has no such operator [UNSUPPORTED_NODE]; tower/Unique (Unique): " in said


def test_objections_of_the_importer(tmp_path: Path) -> None:
    manifest = exported("fp16", 20).manifest
    nonzero = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node("NonZero", ["i"], ["y"], name="tower/NonZero"),
    ]
    said = refusal(write_graph(tmp_path / "a.onnx", *nonzero, kind=TensorProto.INT64), manifest, tmp_path)
    assert "tower/NonZero (NonZero): " in said
    product = helper.make_node("MatMul", ["x", "x"], ["y"], name="vision.layers.1.fc1/MatMul")
    said = refusal(write_graph(tmp_path / "b.onnx", product), manifest, tmp_path)
    assert "vision.layers.1.fc1/MatMul (MatMul): " in said and "must match" in said


def test_a_file_that_is_no_graph_or_lacks_its_weights(tmp_path: Path) -> None:
    graph, manifest = exported("fp16", 20)
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"nonsense")
    assert "Failed to parse the ONNX model" in refusal(garbage, manifest, tmp_path)
    alone = copy_graph(graph, tmp_path)
    alone.with_name("vision.onnx.data").unlink()
    assert refusal(alone, manifest, tmp_path).endswith("its weights should lie in vision.onnx.data beside it")
    with pytest.raises(EngineError, match="there is no graph"):
        build_engine(tmp_path / "none.onnx", manifest, tmp_path)
    with pytest.raises(EngineError, match="none is not a directory"):
        build_engine(graph, manifest, tmp_path / "none")


def test_a_graph_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    graph, manifest = exported("fp16", 20)
    wider = manifest_for("fp16", 20, geometry=replace(GEOMETRY, projector_size=48))
    assert "its output tokens float16 [1, 13, 24] should be tokens float16 [1, 13, 48]" in refusal(
        graph, wider, tmp_path
    )
    videos = refusal(graph, manifest_for("fp16", 20, batch=2), tmp_path)
    assert "its input frames uint8 [1, 6, 56, 56, 3] should be frames uint8 [2, " in videos
    assert all(f"its output {name} " in videos for name in ("tokens", "positions", "dynamic", "weights"))
    other = refusal(graph, manifest_for("bf16", 20), tmp_path)
    assert "vision.layers.0.fc1/MatMul (MATRIX_MULTIPLY) would compute in float16, not in bfloat16" in other

    named = tmp_path / "named.onnx"
    write_graph(named, helper.make_node("Relu", ["x"], ["y"]))
    said = refusal(named, manifest, tmp_path)
    assert "it has no input frames uint8" in said and "it has an input x float32 [2, 3] that is not announced" in said


def test_float32_unasked_is_refused_and_the_products_are_named(tmp_path: Path) -> None:
    graph, manifest = exported("fp16", 20)
    sloppy = copy_graph(graph, tmp_path)
    in_float32(sloppy, "vision.layers.0.attention/MatMul", "vision.layers.1.fc1/MatMul")
    said = refusal(sloppy, manifest, tmp_path)
    assert said.endswith(
        "vision.layers.0.attention/MatMul (MATRIX_MULTIPLY) would compute in float32, not in float16; "
        "vision.layers.1.fc1/MatMul (MATRIX_MULTIPLY) would compute in float32, not in float16"
    )
    assert "tower/" not in said, "similarity and plan are float32 by right"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed, probably for want of memory"),
        ("import os; os.abort()", "was ended by signal 6"),
        ("raise SystemExit('no room')", "failed with status 1: no room"),
    ],
)
def test_a_builder_that_crashes_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    graph, manifest = exported("fp16", 20)
    monkeypatch.setattr(tensorrt_build, "_WORKER", program)
    with pytest.raises(EngineError, match=f"builds with TensorRT for RTX {message}"):
        build_engine(graph, manifest, tmp_path, A100)
    assert not list(tmp_path.iterdir())


def test_too_little_workspace_says_so(tmp_path: Path) -> None:
    graph, manifest = exported("fp16", 20)
    with pytest.raises(EngineError, match=r"could not build an engine from .*workspace"):
        build_engine(graph, manifest, tmp_path, replace(A100, workspace=1 << 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"product": "cuda"}, "no TensorRT product 'cuda'"),
        ({"targets": ("a100",)}, "must be like"), ({"targets": "sm80"}, "must be like"),
        ({"targets": ("sm90",)}, "does not build for sm90 ahead of time"),
        ({"product": "tensorrt", "targets": ("sm80", "sm90")}, "builds for one card"),
        ({"workspace": 1000}, "workspace is 1000 bytes"), ({"workspace": 4.0}, "workspace is 4.0 bytes"),
        ({"optimization_level": 6}, r"must lie in 0\.\.5"),
        ({"product": "tensorrt", "hardware_compatibility": "all"}, "must be one of none, ampere"),
        ({"hardware_compatibility": "ampere+"}, "does not offer hardware_compatibility: .*--engine tensorrt"),
        ({"version_compatible": True, "strip_weights": True}, "not offer version_compatible, strip_weights"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EarlyTomError, match=message) as caught:
        BuildOptions(**options)
    assert isinstance(caught.value, (ConfigError, EngineError))


def test_options_are_plain_and_name_the_file() -> None:
    options = BuildOptions("tensorrt", ("sm90",), timing_cache=Path("caches"), hardware_compatibility="ampere+")
    plain = json.loads(json.dumps(options.to_dict()))
    assert BuildOptions(**plain | {"targets": tuple(plain["targets"])}) == options
    assert not options.tf32 and "timing_cache" not in asdict(options.settings())
    assert engine_file_name(options) == "vision.sm90.ampere-plus.trt.engine"
    assert engine_file_name(BuildOptions(targets=("sm86", "sm80", "sm80"))) == "vision.sm80-sm86.rtx.engine"
    lean = BuildOptions("tensorrt", version_compatible=True, strip_weights=True)
    assert engine_file_name(lean, ("sm80",)) == "vision.sm80.version-compatible.strip-weights.trt.engine"


def test_what_this_machine_can_build() -> None:
    assert "for sm80, sm86, sm89, sm120, sm121 without a GPU" in probe_build("tensorrt-rtx")
