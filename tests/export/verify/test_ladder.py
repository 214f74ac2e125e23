"""Verifying a bundle: it fails when it should, says where, and can be repeated by hand."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import pytest
import torch

from earlytom.errors import BundleError, CheckpointError, EngineError, InputError
from earlytom.tower import StaticTower
from engines.bundle.manifest import MODEL, Manifest
from engines.bundle.reader import Bundle
from export.onnx.check import check_graph
from export.onnx.traced import run_traced
from export.report import render_report
from export.verify import HopReport, ParityReport, verify_bundle
from tests.bundles import copy_bundle, small_bundle
from tests.cases import small_clip, small_config, small_vision

CLIP = small_clip(12)[0]


@pytest.fixture(scope="module")
def report():
    return verify_bundle(small_bundle(), CLIP, vision=small_vision())


def change_weight(bundle: Bundle, name: str, by: float) -> None:
    """Add `by` to one number of one weight of the graph, in place."""
    path = bundle.path / MODEL
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[values.size // 2] += by
    weight.CopyFrom(onnx.numpy_helper.from_array(values, name))
    path.unlink()
    (bundle.path / f"{MODEL}.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location=f"{MODEL}.data", size_threshold=1024)


def test_the_ladder(report):
    assert [(hop.name, hop.dtype, hop.status) for hop in report.hops] == [
        ("oracle → static", "fp32", "passed"), ("static → onnxruntime", "fp32", "passed"),
    ]
    assert report.passed and report.complete and report.reason == ""
    text = json.dumps([hop.to_dict() for hop in report.hops], allow_nan=False)
    assert json.loads(text)[1]["differences"]["tokens"]["max_abs"] < 1e-4
    assert json.loads(text)[1]["plan"]["flips"] == []
    assert tuple(map(HopReport.from_dict, json.loads(text))) == report.hops


def test_polygraphy_and_we_measure_the_same(report):
    for hop in report.hops:
        for name in ("tokens", "weights"):
            ours, theirs = hop.numbers.differences[name], hop.polygraphy[name]
            assert theirs["passed"]
            assert theirs["max_absdiff"] == pytest.approx(ours.max_abs, rel=1e-6)
            assert theirs["mean_absdiff"] == pytest.approx(ours.mean_abs, rel=1e-4)
            assert theirs["cosine_similarity"] == pytest.approx(ours.cosine, abs=1e-6)
            assert (theirs["snr"] is None) == (ours.max_abs == 0)
            if theirs["snr"] is not None:
                assert theirs["snr"] == pytest.approx(ours.sqnr_db, abs=0.1)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ("vision.layers.0.fc1.weight", "encoder layer 0;"),
        ("vision.layers.1.attention.v_proj.weight", "encoder layer 1;"),
        ("vision.layers.2.fc2.weight", "encoder layers 2 to 3;"),
        ("vision.linear_1.weight", "received and all before it are within tolerance: layers 4 on"),
    ],
)
def test_one_wrong_weight_fails_and_its_layer_is_named(weight, says, tmp_path):
    """Merge layers are 0, 1 and 3, so that layers 2 and 3 cannot be told apart."""
    bundle = copy_bundle(small_bundle(), tmp_path / "bundle")
    change_weight(bundle, weight, 0.5)
    found = verify_bundle(bundle, CLIP, vision=small_vision())
    oracle, onnxruntime = found.hops
    assert not found.passed and oracle.status == "passed" and onnxruntime.status == "failed"
    assert "static → onnxruntime failed: " in found.reason
    assert says in onnxruntime.bisect


def test_a_wrong_plan_fails(tmp_path):
    """The graph's tau is another one: its numbers are right where they can be compared, its choices are not."""
    bundle = copy_bundle(small_bundle(), tmp_path / "bundle")
    config = small_config(tau=0.8)
    wrong = Bundle(bundle.path, replace(bundle.manifest, config=config))
    found = verify_bundle(wrong, CLIP, vision=small_vision())
    (hop,) = found.hops[1:]
    assert hop.status == "failed" and "plan of merge layer" in hop.bisect
    assert any(flip.kind == "plan" and not flip.excused for flip in hop.numbers.plan.flips)


def test_nan_in_the_graph_fails(tmp_path):
    bundle = copy_bundle(small_bundle(), tmp_path / "bundle")
    change_weight(bundle, "vision.layers.1.fc1.weight", float("nan"))
    found = verify_bundle(bundle, CLIP, vision=small_vision())
    assert not found.passed and any("NaN" in reason for reason in found.hops[1].reasons)
    assert Manifest.from_json(replace(bundle.manifest, parity=found.hops).to_json()).parity == found.hops
    assert "failed" in render_report(replace(bundle.manifest, parity=found.hops))


def test_the_graphs_intermediates_are_the_towers():
    tower = StaticTower(small_vision(), small_config())
    expected, found = tower.trace(CLIP[None]), run_traced(small_bundle(), CLIP[None])
    for a, b in zip((*expected.outputs, expected.received), (*found.outputs, found.received)):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-5)
    for a, b in zip(expected.stages, found.stages):
        for x, y in zip(a, b):
            torch.testing.assert_close(y, x, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_polygraphy_repeats_the_hop_by_hand(dtype, tmp_path):
    """With the command from the report, in the bundle's directory; and it sees a wrong graph."""
    bundle = copy_bundle(small_bundle(dtype), tmp_path / "bundle")
    saved = tmp_path / "some tensors"
    found = verify_bundle(bundle, CLIP, vision=small_vision(), save_tensors=saved)
    assert {path.name for path in saved.iterdir()} == {
        "inputs.json", "outputs.static.json", "outputs.onnxruntime.json"
    }
    command = shlex.split(found.hops[1].repeat)
    assert command[0] == "polygraphy"
    assert found.hops[1].repeat in render_report(replace(bundle.manifest, parity=found.hops))
    program = str(Path(sys.executable).with_name("polygraphy"))

    def run():
        environment = os.environ | {"POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
        done = subprocess.run(
            [program, *command[1:]], cwd=bundle.path, capture_output=True, text=True, check=False, env=environment
        )
        return done.returncode, done.stdout + done.stderr

    code, text = run()
    assert code == 0 and "PASSED" in text and "tokens" in text, text
    if dtype == "fp32":
        change_weight(bundle, "vision.linear_1.weight", 5.0)
        code, text = run()
        assert code != 0 and "FAILED" in text, text


def test_an_engine_that_shows_outputs_only():
    """The PyTorch tower stands for TensorRT: compared with ONNX Runtime, whose scores and errors are known."""
    found = verify_bundle(small_bundle("fp16"), CLIP, vision=small_vision(), engines=("torch", "onnxruntime"))
    assert [hop.name for hop in found.hops] == ["oracle → static", "static → onnxruntime", "onnxruntime → torch"]
    assert found.passed, found.reason
    assert "hidden_0" in found.hops[1].numbers.differences and "hidden_0" not in found.hops[2].numbers.differences


def test_what_cannot_run_is_never_passed():
    found = verify_bundle(small_bundle(), CLIP, vision=small_vision(), engines=("onnxruntime", "tensorrt"))
    hop = found.hops[-1]
    assert hop.status == "not run" and hop.numbers is None and hop.reasons[0]
    assert found.passed and not found.complete
    text = render_report(replace(small_bundle().manifest, parity=found.hops))
    assert "**not run**" in text and hop.reasons[0] in text
    assert not ParityReport((hop,)).passed and "not run" in ParityReport((hop,)).reason


def test_bfloat16_without_an_engine_is_measured_in_pytorch():
    """ONNX Runtime has no bfloat16 on CPUs; that the plans survive the dtype can be seen all the same."""
    manifest = small_bundle().manifest
    outputs = tuple(replace(t, dtype="bfloat16" if t.name == "tokens" else t.dtype) for t in manifest.outputs)
    bundle = Bundle(small_bundle().path, replace(manifest, dtype="bf16", outputs=outputs))
    found = verify_bundle(bundle, CLIP, vision=small_vision())
    assert [(hop.actual, hop.status) for hop in found.hops] == [
        ("static", "passed"), ("onnxruntime", "not run"), ("static in bf16", "passed")
    ]
    assert found.hops[2].numbers.differences["tokens"].relative > 1e-3


def test_a_bundle_that_is_being_written_can_be_verified():
    bundle = small_bundle()
    unlisted = Bundle(bundle.path, replace(bundle.manifest, files={}))
    steps: list[str] = []
    assert verify_bundle(unlisted, CLIP.numpy(), vision=small_vision(), progress=steps.append).passed
    assert steps[:2] == ["oracle", "static tower"] and "onnxruntime" in steps


def test_what_does_not_fit_is_refused(tmp_path):
    bundle, vision = small_bundle(), small_vision()
    with pytest.raises(InputError, match=r"\[1, 12, 84, 84, 3\]"):
        verify_bundle(bundle, CLIP[:11], vision=vision)
    with pytest.raises(InputError, match="float32"):
        verify_bundle(bundle, CLIP, vision=small_vision().half())
    with pytest.raises(EngineError, match="no engine abacus"):
        verify_bundle(bundle, CLIP, vision=vision, engines=("abacus",))
    with pytest.raises(CheckpointError, match="other weights"):
        verify_bundle(bundle, CLIP, checkpoint="demo")
    edited = copy_bundle(bundle, tmp_path / "bundle")
    change_weight(edited, "vision.linear_1.weight", 0.5)
    with pytest.raises(BundleError, match="damaged"):
        verify_bundle(edited.path, CLIP, vision=vision)


def test_the_report_says_what_people_ask(report):
    bundle = small_bundle()
    summary = check_graph(bundle.path / MODEL, dtype="fp32", opset=bundle.manifest.opset)
    verified = replace(bundle.manifest, parity=report.hops)
    text = render_report(verified, summary)
    shapes = bundle.manifest.shapes
    for part in (
        f"**{shapes.tokens} tokens**", "after layer 3", "TFLOP", "## Parity", "oracle → static", "near-tie", "SQNR",
        "polygraphy run vision.onnx", "earlytom-verify", "attention: 4 as primitives",
    ):
        assert part in text, part
    assert text == render_report(Manifest.from_json(verified.to_json())).replace(
        "## Parity\n", text[text.index("## Graph") : text.index("## Parity")] + "## Parity\n"
    )
    assert "not verified" in render_report(bundle.manifest)


def test_weights_are_read_from_where_the_manifest_says(monkeypatch):
    asked = []

    def fake_load(name, **options):
        asked.append((name, options))
        options["check"](SimpleNamespace(name=name, digest="0" * 64))
        return SimpleNamespace(vision=small_vision())

    monkeypatch.setattr("export.verify.ladder.load", fake_load)
    assert verify_bundle(small_bundle().path, CLIP).passed
    verify_bundle(small_bundle().path, CLIP, checkpoint="elsewhere")
    assert [name for name, _ in asked] == ["small", "elsewhere"] and asked[0][1]["parts"] == ("vision",)
