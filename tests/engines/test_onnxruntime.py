"""ONNX Runtime on a small tower: the tower's numbers, every dtype, threads, and one sentence for what cannot be."""

from __future__ import annotations

import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from earlytom.config import EarlyTomConfig
from earlytom.errors import BundleError, EarlyTomError, EngineError, InputError
from earlytom.shapes import derive_shapes
from earlytom.tower import TowerOutputs
from earlytom.vision.geometry import VisionGeometry
from earlytom.vision.siglip import Vision
from engines.bundle.manifest import MODEL, TensorSpec
from engines.onnxruntime import CPU, CUDA, TENSORRT, OnnxRuntimeRunner, default_providers, open_bundle, probe
from engines.pytorch import TorchRunner
from engines.runner import OpenOptions
from tests.bundles import small_bundle
from tests.cases import small_clip, small_config, small_vision

GEOMETRY = VisionGeometry(56, 14, 16, 2, 32, 3, projector_size=24)
CONFIG = EarlyTomConfig(retain=0.5, frames=8, merge_layers=(0, 2))
NAMES = list(TowerOutputs._fields)


def clip(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (1, 8, 56, 56, 3), dtype=np.uint8)


def frames_of(seed: int) -> NDArray[np.uint8]:
    """A clip for `runner`."""
    frames: NDArray[np.uint8] = small_clip(12, seed=seed).numpy()
    return frames


@pytest.fixture(scope="module")
def vision() -> Vision:
    return small_vision()


@pytest.fixture(scope="module")
def graph() -> Path:
    """That tower, exported."""
    return small_bundle().path / MODEL


def specs() -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    manifest = small_bundle().manifest
    return manifest.inputs, manifest.outputs


@pytest.fixture(scope="module")
def runner(graph: Path) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(graph, *specs())


MATRIX, SPREAD = np.linspace(-1, 1, 72).reshape(3, 24), np.linspace(-0.1, 0.1, 136).reshape(17, 8)
DTYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


def stand_in(path: Path, dtype: int = TensorProto.FLOAT, *, extra: bool = False) -> tuple[Any, Any]:
    """A graph of eight nodes at `path` with the border of the tiny tower, and that border.

    tokens = SPREAD (mean colour of each frame) MATRIX, computed in `dtype`.
    """
    shapes = derive_shapes(CONFIG, GEOMETRY)
    inputs = tuple(TensorSpec(name, *spec) for name, spec in shapes.inputs.items())
    outputs = tuple(TensorSpec(name, *spec) for name, spec in shapes.outputs(DTYPES[dtype]).items())
    nodes = [
        helper.make_node("Cast", ["frames"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values", "axes"], ["means"], keepdims=0),
        helper.make_node("Cast", ["means"], ["narrow"], to=dtype),
        helper.make_node("MatMul", ["narrow", "matrix"], ["wide"]),
        helper.make_node("MatMul", ["spread", "wide"], ["tokens"]),
        *(helper.make_node("Identity", [f"{spec.name}_0"], [spec.name]) for spec in outputs[1:]),
    ]
    kinds = {"positions": TensorProto.INT64, "dynamic": TensorProto.BOOL, "weights": TensorProto.FLOAT}
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("matrix", dtype, MATRIX.shape, MATRIX.ravel()),
        helper.make_tensor("spread", dtype, SPREAD.shape, SPREAD.ravel()),
        *(
            helper.make_tensor(f"{spec.name}_0", kinds[spec.name], spec.shape, np.arange(math.prod(spec.shape)) % 2)
            for spec in outputs[1:]
        ),
    ]
    made = [helper.make_tensor_value_info(s.name, ({"tokens": dtype} | kinds)[s.name], s.shape) for s in outputs]
    if extra:
        made.append(helper.make_tensor_value_info("means", TensorProto.FLOAT, [1, 8, 3]))
    given = helper.make_tensor_value_info("frames", TensorProto.UINT8, inputs[0].shape)
    model = helper.make_model(
        helper.make_graph(nodes, "stand_in", [given], made, constants),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return inputs, outputs


def stand_in_tokens() -> NDArray[np.float64]:
    return SPREAD @ (clip().mean(axis=(2, 3)) @ MATRIX)


def test_the_numbers_are_the_towers(runner: OnnxRuntimeRunner, vision: Vision) -> None:
    frames = frames_of(3)
    given, expected = runner.run(frames), TorchRunner(vision, small_config()).run(frames)
    assert isinstance(given, TowerOutputs)
    for name, left, right in zip(NAMES, given, expected):
        assert left.dtype == right.dtype and left.shape == right.shape
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert runner.name == "onnxruntime" and runner.why == "onnxruntime, CPU" and runner.providers == (CPU,)


def test_numpy_and_torch_frames_are_the_same_whatever_their_layout(runner: OnnxRuntimeRunner) -> None:
    frames = frames_of(4)
    expected = runner.run(frames)
    read_only = frames.copy()
    read_only.setflags(write=False)
    for other in (
        torch.from_numpy(frames), read_only, np.asfortranarray(frames),
        torch.from_numpy(frames).permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1),
    ):
        assert all(torch.equal(a, b) for a, b in zip(runner.run(other), expected))


def test_outputs_belong_to_the_caller(runner: OnnxRuntimeRunner) -> None:
    first = runner.run(frames_of(1))
    kept = first.tokens.clone()
    runner.run(frames_of(2)).tokens.zero_()
    assert torch.equal(first.tokens, kept)


def test_threads_share_a_session(runner: OnnxRuntimeRunner) -> None:
    assert runner.thread_safe
    clips = [frames_of(seed) for seed in range(4)] * 4
    alone = [runner.run(frames) for frames in clips[:4]] * 4
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(runner.run, clips))
    for left, right in zip(together, alone):
        assert all(torch.equal(a, b) for a, b in zip(left, right))


def test_named_outputs_include_those_beside_the_towers(tmp_path: Path) -> None:
    border = stand_in(tmp_path / "traced.onnx", extra=True)
    with OnnxRuntimeRunner(tmp_path / "traced.onnx", *border, threads=1) as runner:
        named = runner.run_named({"frames": clip()})
        assert list(named) == [*NAMES, "means"]
        np.testing.assert_allclose(named["means"], clip().mean(axis=(2, 3)), rtol=1e-5)
        for name, value in zip(NAMES, runner.run(clip())):
            np.testing.assert_array_equal(named[name], value.numpy())
        with pytest.raises(InputError, match="no frames"):
            runner.run_named({})


def test_half_precision_runs_on_a_cpu(tmp_path: Path) -> None:
    border = stand_in(tmp_path / "half.onnx", TensorProto.FLOAT16)
    with OnnxRuntimeRunner(tmp_path / "half.onnx", *border) as runner:
        outputs = runner.run(clip())
    assert outputs.tokens.dtype == torch.float16
    np.testing.assert_allclose(outputs.tokens.numpy(), stand_in_tokens(), atol=0.3)
    assert outputs.positions.flatten().tolist() == [0, 1] * 8 and outputs.dynamic.tolist() == [[False, True] * 2]


def refusal(kind: type[EarlyTomError], call: Any) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bfloat16_on_a_cpu_is_refused_with_the_way_out(tmp_path: Path) -> None:
    border = stand_in(tmp_path / "b.onnx", TensorProto.BFLOAT16)
    text = refusal(EngineError, lambda: OnnxRuntimeRunner(tmp_path / "b.onnx", *border))
    assert "no bfloat16 kernels for CPUs" in text and "--dtype fp16" in text


@pytest.mark.parametrize(
    "frames",
    [
        frames_of(0).astype(np.float32), frames_of(0)[0], frames_of(0)[:, :4], small_clip(12).int(), [[1]], None,
        np.zeros((1, 12, 28, 28, 3), np.uint8), torch.zeros(2, 12, 84, 84, 3, dtype=torch.uint8),
    ],
)
def test_every_input_is_checked(runner: OnnxRuntimeRunner, frames: Any) -> None:
    text = refusal(InputError, lambda: runner.run(frames))
    assert text.startswith("the engine takes frames uint8 [1, 12, 84, 84, 3] and was given")


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 9, "half", "no data", "short data"])
def test_a_graph_that_cannot_be_loaded(tmp_path: Path, graph: Path, content: Any) -> None:
    path = tmp_path / "vision.onnx"
    if content == "half":
        path.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    elif content in ("no data", "short data"):
        shutil.copyfile(graph, path)
        if content == "short data":
            (tmp_path / "vision.onnx.data").write_bytes(b"short")
    elif content is not None:
        path.write_bytes(content)
    text = refusal(BundleError if content is None else EngineError, lambda: OnnxRuntimeRunner(path, *specs()))
    assert str(path) in text


def test_another_graph_than_announced_is_refused(tmp_path: Path) -> None:
    inputs, outputs = stand_in(tmp_path / "g.onnx")
    wide = (TensorSpec("tokens", "float32", (1, 18, 24)), *outputs[1:])
    text = refusal(EngineError, lambda: OnnxRuntimeRunner(tmp_path / "g.onnx", inputs, wide))
    assert "lacks tokens float32 [1, 18, 24]" in text
    text = refusal(EngineError, lambda: OnnxRuntimeRunner(tmp_path / "g.onnx", (), outputs))
    assert "takes frames besides" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_providers_that_are_not_there(tmp_path: Path) -> None:
    border = stand_in(tmp_path / "g.onnx")
    for options in ({"providers": [TENSORRT, CUDA]}, {"device": "cuda"}, {"device": "cuda:1"}):
        text = refusal(EngineError, lambda options=options: OnnxRuntimeRunner(tmp_path / "g.onnx", *border, **options))
        assert "onnxruntime-gpu" in text
    assert "must be cpu or cuda" in refusal(EngineError, lambda: default_providers("mps"))
    assert default_providers() == default_providers("cpu") == (CPU,)
    assert probe("onnxruntime") == f"onnxruntime {onnxruntime.__version__} with CPU"


def test_a_provider_that_falls_back_to_the_cpu_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With broken CUDA libraries ONNX Runtime logs, and runs on the CPU."""
    border = stand_in(tmp_path / "g.onnx")
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, **options: real(path, providers=[CPU]))
    text = refusal(EngineError, lambda: OnnxRuntimeRunner(tmp_path / "g.onnx", *border, device="cuda"))
    assert f"could not start {CUDA}" in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert OnnxRuntimeRunner(tmp_path / "g.onnx", *border).providers == (CPU,)  # nobody asked for CUDA by name


@pytest.mark.parametrize(("device", "number"), [("cuda:1", 1), ("cuda", 3), (None, 3)])
def test_the_card_and_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str | None, number: int
) -> None:
    """Without a number the card is torch's current one, on which the outputs are allocated; TF32 would round plans."""
    border = stand_in(tmp_path / "g.onnx")
    real, seen = onnxruntime.InferenceSession, list[Any]()

    class Session:
        def __init__(self, path: Path, sess_options: Any, providers: Any) -> None:
            seen.append(providers)
            self.inner = real(path, sess_options=sess_options, providers=[CPU])
            self.get_inputs, self.get_outputs = self.inner.get_inputs, self.inner.get_outputs

        def get_providers(self) -> list[str]:
            return [CUDA, CPU]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    runner = OnnxRuntimeRunner(tmp_path / "g.onnx", *border, device=device)
    assert seen == [[(CUDA, {"device_id": number, "use_tf32": 0}), CPU]]
    assert runner.device == torch.device("cuda", number)


def test_thread_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    border = stand_in(tmp_path / "g.onnx")
    text = refusal(EngineError, lambda: OnnxRuntimeRunner(tmp_path / "g.onnx", *border, threads=0))
    assert "must be at least 1" in text
    seen: list[int] = []
    real = onnxruntime.InferenceSession

    def session(path: Path, sess_options: Any, providers: Any) -> Any:
        seen.append(sess_options.intra_op_num_threads)
        return real(path, sess_options=sess_options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    OnnxRuntimeRunner(tmp_path / "g.onnx", *border, threads=1)
    assert seen == [1]


def test_closing(tmp_path: Path) -> None:
    runner = OnnxRuntimeRunner(tmp_path / "g.onnx", *stand_in(tmp_path / "g.onnx"))
    runner.close()
    runner.close()
    for call in (lambda: runner.run(clip()), lambda: runner.run_named({"frames": clip()})):
        assert "was closed" in refusal(EngineError, call)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    border = stand_in(tmp_path / "g.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for call in (lambda: probe("onnxruntime"), lambda: OnnxRuntimeRunner(tmp_path / "g.onnx", *border)):
        assert "pip install onnxruntime" in refusal(EngineError, call)


def test_a_bundle_without_a_graph() -> None:
    from engines.bundle.reader import Bundle
    from tests.engines.bundle.test_bundle import make_manifest

    bundle = Bundle(Path("/nowhere"), make_manifest())
    assert "holds no vision.onnx" in refusal(EngineError, lambda: open_bundle("onnxruntime", bundle, OpenOptions()))


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu")
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_cuda(tmp_path: Path, dtype: int) -> None:
    border = stand_in(tmp_path / "g.onnx", dtype)
    with OnnxRuntimeRunner(tmp_path / "g.onnx", *border, device="cuda") as runner:
        outputs = [runner.run(clip()), runner.run(torch.from_numpy(clip()).cuda())]
    assert outputs[0].tokens.is_cuda and torch.equal(outputs[0].tokens, outputs[1].tokens)
    np.testing.assert_allclose(outputs[0].tokens.float().cpu().numpy(), stand_in_tokens(), atol=2)
