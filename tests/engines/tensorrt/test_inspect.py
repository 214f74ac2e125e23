"""The inspector's JSON read: fused attention counted, what is not fused and what is of another type named.

The samples are written by hand, see tests/data/README.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from earlytom.config import EarlyTomConfig
from earlytom.errors import EngineError
from engines.bundle.manifest import Manifest
from engines.tensorrt.inspect import (
    EngineSummary,
    expected_attention,
    inspect_engine,
    inspect_file,
    inspect_plan,
    summarise,
)
from tests.cases import SMALL, small_config
from tests.fake_tensorrt_builder import fake_tensorrt

DATA = Path(__file__).parents[2] / "data"
LAYERS = ("vision.layers.0.attention", "vision.layers.1.attention")


def sample(name: str) -> str:
    return (DATA / f"inspector_{name}.json").read_text()


def small_manifest(config: EarlyTomConfig) -> Manifest:
    return Manifest.derive(
        config, SMALL, dtype="fp16", opset=20, attention="primitives", tools={},
        checkpoint={"name": "random", "format": "none", "digest": "0"},
    )


@pytest.mark.parametrize("name", ["fused", "operator"])
def test_all_is_well(name: str) -> None:
    summary = summarise(sample(name), LAYERS, "float16")
    assert (summary.fused, summary.unfused, summary.other_types, summary.warnings) == (LAYERS, (), (), ())
    assert len(summary.fused_kernels) == 2 and all("_gemm_mha_v2" in kernel for kernel in summary.fused_kernels)
    plain: dict[str, Any] = json.loads(json.dumps(asdict(summary.inspection())))
    assert plain["attention"] == plain["fused"] == 2 and plain["kernels"] == 23


def test_what_is_not_fused_and_what_is_float32_is_named() -> None:
    summary = summarise(sample("unfused"), LAYERS, "float16")
    assert (summary.fused, summary.unfused) == (LAYERS[:1], LAYERS[1:])
    assert summary.other_types == (
        ("vision.layers.1.attention/MatMul", "tf32"),
        ("vision.layers.1.attention/MatMul_2", "tf32"),
        ("vision.layers.1.fc1/MatMul", "float32"),
    )
    first, second = summary.warnings
    assert first == "attention is not fused in 1 of 2 layers: vision.layers.1.attention"
    assert second.startswith("3 products do not compute in float16: vision.layers.1.attention/MatMul (tf32), ")


def test_every_layer_is_to_be_fused() -> None:
    summary = summarise(sample("fused"), (*LAYERS, "vision.layers.2.attention"), "float16")
    assert summary.unfused == ("vision.layers.2.attention",)
    every = tuple(f"vision.layers.{i}.attention" for i in range(SMALL.layers))
    unpruned = small_config(merge_layers=(), frame_budgets=(), retain=1.0)
    assert expected_attention(small_manifest(small_config())) == expected_attention(small_manifest(unpruned)) == every


def test_what_a_layer_received_is_no_attention_of_it() -> None:
    """Its products and softmaxes lie beside the attention, under a name of their own: a kernel of them is another."""
    text = sample("fused").replace("layers.1.attention/", "layers.1.attention.received/")
    summary = summarise(text, LAYERS, "float16")
    assert (summary.fused, summary.unfused) == (LAYERS[:1], LAYERS[1:])


def test_another_type_than_the_graphs() -> None:
    summary = summarise(sample("fused"), LAYERS, "bfloat16")
    assert {kind for _, kind in summary.other_types} == {"float16"} and len(summary.other_types) > 10
    assert all(name.startswith("vision.") for name, _ in summary.other_types), "the plan is float32 by right"


def test_kernels_without_nodes_are_counted() -> None:
    assert not summarise(sample("no_metadata"), LAYERS, "float16").warnings
    (warning,) = summarise(sample("no_metadata"), (*LAYERS, "vision.layers.2.attention"), "float16").warnings
    assert warning.startswith("2 kernels do attention where the graph has 3 to fuse")


def test_names_of_engine_layers_do_where_metadata_is_missing() -> None:
    parsed = json.loads(sample("unfused"))
    for layer in parsed["Layers"]:
        layer["Metadata"] = ""
    summary = summarise(json.dumps(parsed), ("vision.layers.1.attention",), "float16")
    assert summary.unfused == ("vision.layers.1.attention",)
    assert ("vision_layers_1_fc1/MatMul_myl0_13", "float32") in summary.other_types


def test_an_engine_without_details_and_text_that_is_none() -> None:
    (warning,) = summarise(sample("names_only"), LAYERS, "float16").warnings
    assert "built without detailed profiling" in warning
    for text in ("", "[]", '{"Layers": 3}'):
        with pytest.raises(EngineError, match="the inspector's answer cannot be read"):
            summarise(text, LAYERS, "float16")


def test_a_plan_is_read_without_a_card(tmp_path: Path) -> None:
    """The real one is read in test_build; what is missing is said."""
    manifest, plan = small_manifest(small_config(merge_layers=(), frame_budgets=(), retain=1.0)), tmp_path / "a.engine"
    function = b"\0 function={ name=%b fqn=%b_0x0 args={ } }\0"
    names = [b"_gemm_mha_v2", b"__myl_MulAdd", b"_gemm_mha_v2", b"__myl_CastMean"]
    plan.write_bytes(b"".join(function % (name, name) for name in names))
    summary = inspect_plan(plan, manifest)
    assert summary.kernels == 4 and len(summary.fused_kernels) == len(summary.fused) == 2
    assert summary.warnings[0].startswith("2 kernels do attention where the graph has 4 to fuse")
    plan.write_bytes(b"another format")
    assert inspect_plan(plan, manifest).warnings == ("a.engine does not list its kernels",)


@pytest.mark.parametrize("version", ["10.15.1.29", "11.2.1.2"])
def test_the_inspector_is_asked_as_its_bindings_want(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    trt: Any = fake_tensorrt(version)
    trt.state.inspected = sample("fused")
    manifest = small_manifest(small_config(merge_layers=(2,), frame_budgets=(6,)))
    summary = inspect_engine(trt, trt.Runtime(None).deserialize_cuda_engine(b"an engine"), manifest)
    assert isinstance(summary, EngineSummary) and summary.unfused == tuple(
        f"vision.layers.{i}.attention" for i in (2, 3)
    )

    trt.state.inspected = ""
    (warning,) = inspect_engine(trt, trt.Runtime(None).deserialize_cuda_engine(b"an engine"), manifest).warnings
    assert warning.startswith("the inspector's answer cannot be read"), "which is no reason to lose the engine"
    trt.state.inspected = sample("fused")

    monkeypatch.setattr("engines.tensorrt.inspect.import_product", lambda name: trt)
    engine, graph = tmp_path / "vision.sm80.trt.engine", tmp_path / "vision.onnx"
    engine.write_bytes(b"an engine")
    assert inspect_file(engine, "tensorrt", manifest) == summary
    engine.write_bytes(b"a stripped engine")
    assert inspect_file(engine, "tensorrt", manifest, graph) == summary
    assert trt.state.refitted == [str(graph)]
    trt.state.missing = ["vision.layers.0.fc1.weight"]
    with pytest.raises(EngineError, match=r"lacks 1 weights of the stripped engine .*built from another graph"):
        inspect_file(engine, "tensorrt", manifest, graph)
    engine.write_bytes(b"something else")
    with pytest.raises(EngineError, match="cannot be loaded"):
        inspect_file(engine, "tensorrt", manifest)
