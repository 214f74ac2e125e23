"""What only the full TensorRT has, through a stand-in that has the real bindings' members and parameters.

The build runs in this process here, with a card that is made up; parsing and the network are TensorRT for RTX's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from earlytom.errors import EngineError
from engines.bundle.manifest import BuildSettings
from engines.bundle.reader import Bundle
from engines.cards import Card
from engines.products import product_of
from engines.tensorrt import build as tensorrt_build
from engines.tensorrt import network as tensorrt_network
from engines.tensorrt import worker as tensorrt_worker
from engines.tensorrt.build import BuildOptions, build_engine, probe_build
from export.build import look_at
from tests.fake_tensorrt_builder import RECORDS, fake_tensorrt, record
from tests.tensorrt_graphs import exported

rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
VERSIONS = ("10.15.1.29", "11.2.1.2")
H100 = Card("NVIDIA H100 80GB HBM3", "sm90", "580.95.05", "13.1")


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in in place of `import tensorrt`, and an H100 in the machine."""
    module = fake_tensorrt(request.param)
    use(monkeypatch, module, H100)
    return module


def use(monkeypatch: pytest.MonkeyPatch, module: Any, card: Card | None) -> None:
    for place in (tensorrt_build, tensorrt_worker):
        monkeypatch.setattr(place, "import_product", lambda name: module)
        monkeypatch.setattr(place, "current_card", lambda: card)

    def run_here(request: dict[str, Any], progress: Any) -> dict[str, Any]:
        done: dict[str, Any] = tensorrt_worker.build(json.loads(json.dumps(request)), progress)
        answer: dict[str, Any] = json.loads(json.dumps(done))
        return answer

    monkeypatch.setattr(tensorrt_build, "_run_worker", run_here)


def build(folder: Path, opset: int = 20, progress: Any = None, **options: Any) -> Any:
    graph, manifest = exported("fp16" if opset < 23 else "bf16", opset)
    return build_engine(graph, manifest, folder, BuildOptions("tensorrt", **options), progress=progress)


def test_the_recording_is_what_the_bindings_say() -> None:
    if rtx.__version__ not in RECORDS:
        pytest.skip(f"tensorrt_rtx {rtx.__version__} was not recorded")
    assert record(rtx) == RECORDS[rtx.__version__]


def test_an_engine_for_the_card_in_the_machine(trt: Any, tmp_path: Path) -> None:
    steps: list[str] = []
    made = build(tmp_path, progress=steps.append)
    assert (made.file, made.targets, made.product) == ("vision.sm90.trt.engine", ("sm90",), "tensorrt")
    assert (made.version, made.gpu, made.driver, made.cuda) == (trt.__version__, H100.name, "580.95.05", "13.1")
    assert (tmp_path / made.file).read_bytes() == b"an engine"
    (config,) = trt.state.configs
    assert config.set_flags == set(), "TF32 is off"
    assert config.pools == {trt.MemoryPoolType.WORKSPACE: 4 << 30}
    assert config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
    assert "num_compute_capabilities" not in config.values and "hardware_compatibility_level" not in config.values
    assert steps[:4] == ["load TensorRT", "parse", "Building engine", "Building engine 5 %"]
    assert probe_build("tensorrt") == f"TensorRT {trt.__version__} on NVIDIA H100 80GB HBM3 (sm90)"


def test_everything_that_can_be_asked_for(trt: Any, tmp_path: Path) -> None:
    made = build(
        tmp_path, workspace=1 << 30, optimization_level=5, hardware_compatibility="ampere+", version_compatible=True,
        strip_weights=True, detailed=False, tf32=True,
    )
    (config,) = trt.state.configs
    flag = trt.BuilderFlag
    assert config.set_flags == {flag.TF32, flag.VERSION_COMPATIBLE, flag.STRIP_PLAN, flag.REFIT_IDENTICAL}
    assert config.builder_optimization_level == 5 and config.pools == {trt.MemoryPoolType.WORKSPACE: 1 << 30}
    assert config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert "profiling_verbosity" not in config.values
    assert made.file == "vision.sm90.ampere-plus.version-compatible.strip-weights.trt.engine"
    assert (made.compatibility, made.version_compatible) == ("ampere+", True)
    assert made.settings == BuildSettings(1 << 30, 5, strip_weights=True, detailed=False, tf32=True)
    build(tmp_path, hardware_compatibility="same-cc")
    level = trt.state.configs[-1].hardware_compatibility_level
    assert level is trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def test_the_timing_cache_is_kept_and_guarded(trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, caches = tmp_path / "engines", tmp_path / "caches"
    folder.mkdir()
    file = caches / f"timing.trt-{trt.__version__}.nvidia-h100-80gb-hbm3.sm90.cache"
    build(folder, timing_cache=caches)
    assert [entry.name for entry in caches.iterdir()] == [file.name] and file.read_bytes() == b"+measured"
    build(folder, timing_cache=caches)
    assert file.read_bytes() == b"+measured+measured", "what was measured before is there again"
    for content in (b"damaged", b"foreign device"):
        file.write_bytes(content)
        build(folder, timing_cache=caches)
        assert file.read_bytes() == b"+measured", "and is not used when it does not fit"
    use(monkeypatch, trt, Card("NVIDIA A100-SXM4-80GB", "sm80", None, "13.1"))
    build(folder, timing_cache=caches)
    assert len(list(caches.iterdir())) == 2, "another card, another file"

    blocked = tmp_path / "a file"
    blocked.write_bytes(b"")
    assert build(folder, timing_cache=blocked).file == "vision.sm80.trt.engine", "a lost cache costs only time"


def test_cancelled_it_leaves_nothing(trt: Any, tmp_path: Path) -> None:
    def progress(step: str) -> None:
        if step == "Building engine 50 %":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, progress=progress, timing_cache=tmp_path / "caches")
    assert not list(tmp_path.iterdir())


def test_the_monitor_lets_nothing_through_to_the_builder(trt: Any) -> None:
    said: list[str] = []

    def progress(step: str) -> None:
        said.append(step)
        raise KeyboardInterrupt

    monitor = tensorrt_worker.make_monitor(trt, progress)
    monitor.phase_start("Timing", None, 10)
    assert isinstance(monitor.failure, KeyboardInterrupt)
    assert monitor.step_complete("Timing", 0) is False
    monitor.phase_start("Another", "Timing", 3)
    monitor.phase_finish("Timing")
    assert said == ["Timing"]


def test_another_card_than_asked_for(trt: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"this machine, NVIDIA H100 .*\(sm90\), not for sm80: .*tensorrt-rtx"):
        build(tmp_path, targets=("sm80",))


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_gpu_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    use(monkeypatch, fake_tensorrt(version, gpu=False), None)
    with pytest.raises(EngineError) as caught:
        build(tmp_path)
    assert str(caught.value) == (
        "TensorRT builds on the card that it builds for and finds none here that it can use (CUDA initialization "
        "failure with error: 35): build on the machine with the card, or with --engine tensorrt-rtx, which needs no GPU"
    )
    with pytest.raises(EngineError, match="finds none here that it can use: build on the machine"):
        probe_build("tensorrt")


def test_the_attention_operator_needs_a_version_that_knows_it(trt: Any, tmp_path: Path) -> None:
    assert build(tmp_path, opset=23).file == "vision.sm90.trt.engine"
    trt.__version__ = "10.13.3.9"
    with pytest.raises(EngineError, match=r"does not know the Attention operator of this graph: .*--opset 20"):
        build(tmp_path, opset=23)


@pytest.mark.parametrize("stripped", [False, True])
def test_looking_at_an_engine_gives_weights_to_a_stripped_one_only(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stripped: bool
) -> None:
    """As the export does after each build. TensorRT has no refitter for an engine that was not built for refitting."""
    monkeypatch.setattr("engines.tensorrt.inspect.import_product", lambda name: trt)
    trt.state.inspected = json.dumps({"Layers": []})
    record = build(tmp_path, strip_weights=stripped)
    bundle = Bundle(tmp_path, exported("fp16", 20)[1])
    assert look_at(bundle, record, tmp_path).attention
    assert trt.state.refitted == ([str(tmp_path / "vision.onnx")] if stripped else [])


def test_refitting_says_what_does_not_fit(trt: Any) -> None:
    logger = tensorrt_network.make_logger(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(b"an engine")
    with pytest.raises(EngineError, match=r"no engine without weights: .*e\.isRefittable\(\)"):
        tensorrt_network.refit(trt, engine, Path("vision.onnx"), logger)
    engine = trt.Runtime(logger).deserialize_cuda_engine(b"a stripped engine")
    tensorrt_network.refit(trt, engine, Path("vision.onnx"), logger)
    assert trt.state.refitted == ["vision.onnx"]
    trt.state.missing = ["b", "a"]
    with pytest.raises(EngineError, match=r"vision.onnx lacks 2 weights of the stripped engine \(a, b\)"):
        tensorrt_network.refit(trt, engine, Path("vision.onnx"), logger)


def test_both_products_have_what_the_build_asks_of_them() -> None:
    for version, (name, strong) in zip(RECORDS, (("tensorrt-rtx", 0), ("tensorrt", 1), ("tensorrt", 0))):
        enums, config = RECORDS[version]["enums"], RECORDS[version]["classes"]["IBuilderConfig"]
        assert enums["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"] == strong, version
        assert {"TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT_IDENTICAL"} <= enums["BuilderFlag"].keys()
        assert set(tensorrt_worker.LEVELS.values()) <= enums["HardwareCompatibilityLevel"].keys()
        offered = {target.upper() for target in product_of(name).targets}
        assert offered <= enums.get("ComputeCapability", {}).keys()
        assert ("set_compute_capability" in config["methods"]) == product_of(name).ahead_of_time
