"""Tower to ONNX: ONNX Runtime gives the tower's numbers; the file is minimal, reproducible, and keeps the rules."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from earlytom.config import EarlyTomConfig
from earlytom.errors import ExportError
from earlytom.tower import StaticTower
from earlytom.vision.geometry import VisionGeometry
from earlytom.vision.siglip import Vision
from engines.bundle.manifest import MODEL
from export.onnx.check import check_graph
from export.onnx.exporter import OnnxExport, export_tower
from export.onnx.traced import flatten_trace, traced_names, with_traced_outputs
from tests.bundles import GOLDEN_CONFIG, golden_bundle, golden_vision, small_bundle
from tests.cases import small_clip, small_config, small_vision

SMALL = VisionGeometry(
    image_size=98, hidden_size=32, heads=2, intermediate_size=48, layers=2, projector_size=24
)  # 49 patches, 16 after pooling
OUTPUTS = ("tokens", "positions", "dynamic", "weights")


def small_tower(dtype: torch.dtype = torch.float32, *, batch: int = 1, **settings: Any) -> StaticTower:
    """A tower that exports in a few seconds; weights spread so that frames and patches differ."""
    generator = torch.Generator().manual_seed(1)
    config = EarlyTomConfig(**{"retain": 0.4, "frames": 6, "merge_layers": (1,), "frame_budgets": (4,), **settings})
    vision = Vision(SMALL, config.pooling, config.newline)
    for parameter in vision.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.25 + (parameter.dim() == 1) * 0.1
    return StaticTower(vision.to(dtype).eval().requires_grad_(False), config, batch=batch)


def clip(tower: StaticTower, seed: int = 0) -> NDArray[np.uint8]:
    """Scenes of two or three nearly equal frames, so that some merge."""
    rng = np.random.default_rng(seed)
    v, t, *rest = tower.shapes.inputs["frames"][1]
    scenes = rng.integers(0, 256, (v, (t + 2) // 3, 1, *rest)).repeat(3, axis=2).reshape(v, -1, *rest)[:, :t]
    frames: NDArray[np.uint8] = np.clip(scenes + rng.integers(-9, 10, scenes.shape), 0, 255).astype(np.uint8)
    return frames


def run(path: Path, frames: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"frames": frames})))


def expected(tower: StaticTower, frames: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    with torch.no_grad():
        return {name: value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
                for name, value in tower(torch.from_numpy(frames))._asdict().items()}


def assert_same(got: dict[str, NDArray[Any]], want: dict[str, NDArray[Any]], tolerance: float = 1e-4) -> None:
    for name in OUTPUTS:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype, name
    np.testing.assert_array_equal(got["positions"], want["positions"])
    np.testing.assert_array_equal(got["dynamic"], want["dynamic"])
    np.testing.assert_allclose(got["weights"], want["weights"], atol=tolerance)
    np.testing.assert_allclose(got["tokens"], want["tokens"], atol=tolerance)


@pytest.fixture(scope="module")
def golden_export(tmp_path_factory: pytest.TempPathFactory) -> OnnxExport:
    """The golden checkpoint in float32 at the default opset: the bundle's graph, copied."""
    bundle = golden_bundle("fp32")
    path = shutil.copytree(bundle.path, tmp_path_factory.mktemp("golden") / "bundle") / MODEL
    opset, traced = bundle.manifest.opset, bundle.manifest.traced
    return OnnxExport(path, path.with_name(f"{MODEL}.data"), opset, "primitives", ("frames",), OUTPUTS, traced, 0)


def test_onnx_runtime_gives_the_towers_numbers(golden_export: OnnxExport, e2e_frames: NDArray[np.uint8]) -> None:
    check_graph(golden_export.path, dtype="fp32", opset=golden_export.opset)
    tower = StaticTower(golden_vision(), GOLDEN_CONFIG)
    other = e2e_frames[::-1].copy()  # not the clip it was traced with, and another plan
    other[5:9] = 255 - other[5:9]  # no copies: equal frames tie, and a tie may go either way
    plans = []
    for frames in (e2e_frames[None].copy(), other[None]):
        got = run(golden_export.path, frames)
        assert_same(got, expected(tower, frames))
        plans.append(got["weights"])
    assert not np.array_equal(*plans)


def test_intermediates_are_the_towers(golden_export: OnnxExport, e2e_frames: NDArray[np.uint8]) -> None:
    tower = StaticTower(golden_vision(), GOLDEN_CONFIG)
    assert golden_export.traced == traced_names(tower)
    assert golden_export.traced[:3] == ("similarity_1", "weights_1", "hidden_1")
    destination = golden_export.path.with_name("traced.onnx")
    with_traced_outputs(golden_export.path, destination=destination)
    assert destination.stat().st_size < 2 * golden_export.path.stat().st_size, "the weights were copied"
    got = run(destination, e2e_frames[None])
    assert tuple(got) == (*OUTPUTS, *golden_export.traced)
    with torch.no_grad():
        trace = flatten_trace(tower.trace(torch.from_numpy(e2e_frames[None].copy())))
    for name, value in zip(golden_export.traced, trace, strict=True):
        np.testing.assert_allclose(got[name], value.numpy(), atol=1e-4, err_msg=name)
    one = with_traced_outputs(golden_export.path, ["hidden_3"])
    assert [value.name for value in one.graph.output] == [*OUTPUTS, "hidden_3"]
    with pytest.raises(ExportError, match="no traced value hidden_9"):
        with_traced_outputs(golden_export.path, ["hidden_9"])
    with pytest.raises(ExportError, match="must lie beside"):
        with_traced_outputs(golden_export.path, destination=Path("elsewhere") / "traced.onnx")


@pytest.mark.slow  # a float16 bundle is held against the tower in export/verify/test_ladder.py
def test_half_precision_stays_close_where_the_plans_agree() -> None:
    """On a clip without near-ties; `make slow` has the golden clip at full resolution, in parity/."""
    bundle = small_bundle("fp16")
    path, frames = bundle.path / MODEL, small_clip(12).numpy()
    summary = check_graph(path, dtype="fp16", opset=bundle.manifest.opset)
    assert sorted(summary.attention.values()) == ["primitives"] * 4
    got = run(path, frames)
    want = expected(StaticTower(small_vision(), small_config()), frames)
    assert got["tokens"].dtype == np.float16 and got["weights"].dtype == np.float32
    same = (got["positions"] == want["positions"])[0] & (got["dynamic"] == want["dynamic"])[0][:, None]
    assert same.mean() > 0.9
    mine, theirs = (x["tokens"][0, :-1].astype(np.float64).reshape(*same.shape, -1)[same] for x in (got, want))
    cosine = (mine * theirs).sum(-1) / np.linalg.norm(mine, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert cosine.min() >= 0.999


@pytest.mark.parametrize(
    ("opset", "settings"),
    [
        pytest.param(18, {"merge_layers": (0, 1), "frame_budgets": (5, 3)}, id="opset 18"),
        pytest.param(23, {"merge_layers": (0, 1), "frame_budgets": (5, 3), "batch": 2}, id="opset 23, two videos"),
        pytest.param(19, {"pooling": "average", "newline": "grid"}, id="LLaVA-Video"),
        pytest.param(20, {"pooling": "max", "newline": "no_token", "retain": 0.6, "contextual": 0.4}, id="contextual"),
        pytest.param(20, {"merge_layers": (), "frame_budgets": (), "retain": 1.0}, id="unpruned"),
    ],
)
def test_every_shape_of_tower(tmp_path: Path, opset: int, settings: dict[str, Any]) -> None:
    tower = small_tower(**settings)
    export = export_tower(tower, tmp_path / "vision.onnx", opset=opset)
    assert (export.inputs, export.outputs, export.opset) == (("frames",), OUTPUTS, opset)
    summary = check_graph(export.path, dtype="fp32", opset=opset)
    assert summary.nodes == export.nodes
    fused = "operator" if opset >= 23 else "primitives"
    assert list(summary.attention.values()) == [fused, fused]
    for seed in (0, 1):
        frames = clip(tower, seed)
        assert_same(run(export.path, frames), expected(tower, frames))
    session = ort.InferenceSession(export.path, providers=["CPUExecutionProvider"])
    promised = {name: shape for name, (_, shape) in tower.shapes.outputs("float32").items()}
    assert {output.name: tuple(output.shape) for output in session.get_outputs()} == promised
    assert bool(export.traced) == bool(tower.config.merge_layers)


@pytest.fixture(scope="module")
def small_export(tmp_path_factory: pytest.TempPathFactory) -> OnnxExport:
    return export_tower(small_tower(), tmp_path_factory.mktemp("small") / "vision.onnx")


def test_one_merge_layer_keeps_both_names_of_its_plan(small_export: OnnxExport) -> None:
    """With one merge layer the composite of the plans is that layer's plan: one value, two names."""
    traced = small_export.path.with_name("traced.onnx")
    with_traced_outputs(small_export.path, ["weights_1"], traced)
    got = run(traced, clip(small_tower()))
    np.testing.assert_array_equal(got["weights_1"], got["weights"])


@pytest.mark.parametrize(
    ("opset", "settings"),
    [
        pytest.param(18, {"pooling": "average", "newline": "grid"}, marks=pytest.mark.slow),
        (20, {"pooling": "max", "contextual": 0.4}),
        pytest.param(23, {}, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_keeps_the_rules(tmp_path: Path, opset: int, settings: dict[str, Any]) -> None:
    """Below opset 22 neither Conv nor the poolings take bfloat16."""
    export = export_tower(small_tower(torch.bfloat16, **settings), tmp_path / "vision.onnx", opset=opset)
    summary = check_graph(export.path, dtype="bf16", opset=export.opset)
    assert ("Conv" in summary.operators) == (opset >= 22)
    assert summary.attention and all(name.startswith("tower/") for name in summary.float32_products)
    with pytest.raises(ExportError, match="weight-type"):
        check_graph(export.path, dtype="fp32", opset=export.opset)


def test_the_file_holds_each_weight_once_under_its_name_and_no_path_of_this_machine(golden_export: OnnxExport) -> None:
    model = onnx.load(golden_export.path, load_external_data=False)
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    parameters = {f"vision.{name}": value for name, value in golden_vision().named_parameters()}
    assert {name for name in stored if name.startswith("vision.")} <= parameters.keys()
    assert stored["vision.layers.0.fc1.weight"] == (48, 96), "transposed to the layout that MatMul reads"
    weights = sum(value.numel() * value.element_size() for value in parameters.values())
    assert golden_export.data.stat().st_size < weights + 300_000
    text = golden_export.path.read_bytes()
    assert len(text) < 400_000
    folders = [str(folder).encode() for folder in (Path(__file__).parents[3], Path.home())]
    for word in (*folders, b"site-packages", b".py", b"stack_trace", b"aten"):
        assert word not in text, word
    locations = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert locations == {golden_export.data.name}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and "vision.layers.5.attention/Softmax" in names


@pytest.mark.slow  # a whole bundle is compared so in export/test_cli.py
def test_the_same_bytes_every_time(small_export: OnnxExport, tmp_path: Path) -> None:
    """Also in another process, with other hashes and another working directory."""
    code = (
        "import sys; from pathlib import Path; from tests.export.onnx.test_exporter import small_tower, export_tower;"
        "export_tower(small_tower(), Path(sys.argv[1]) / 'vision.onnx')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path, env=environment)
    for name in ("vision.onnx", "vision.onnx.data"):
        assert (tmp_path / name).read_bytes() == small_export.path.with_name(name).read_bytes(), name


def test_failures_are_one_sentence_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = small_tower(merge_layers=(), frame_budgets=(), retain=1.0)
    with pytest.raises(ExportError, match="opset 17 cannot be exported, choose one of 18, 19, 20, 23"):
        export_tower(tower, tmp_path / "vision.onnx", opset=17)

    def full(model: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    steps: list[str] = []
    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(ExportError, match=r"vision\.onnx could not be written: No space left on device"):
        export_tower(tower, tmp_path / "vision.onnx", progress=steps.append)
    assert steps == ["trace", "optimise", "write"]
    assert not list(tmp_path.iterdir())

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("first line.\nmore lines")

    monkeypatch.setattr("torch.onnx.export", broken)
    with pytest.raises(ExportError, match=r"could not be traced to ONNX opset 20: first line$"):
        export_tower(tower, tmp_path / "vision.onnx")
