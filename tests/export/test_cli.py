"""The commands as a user types them: what they write, what they refuse, and that nothing is left behind."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from earlytom.calibration.preset_file import CalibratedPreset, Origin
from earlytom.checkpoint import load
from earlytom.errors import BundleError, EngineError
from earlytom.video.clips import synthetic_clip
from engines.bundle.manifest import EngineRecord
from engines.bundle.reader import read_bundle
from engines.bundle.writer import BundleWriter
from engines.infer import main as infer
from engines.opening import open_runner
from engines.tensorrt.build import engine_file_name
from export import EngineOptions, ExportOptions, add_engine
from export import job as job_module
from export import run as run_module
from export.cli import build_main, export_parser, filled, main, verify_main
from tests import clips
from tests.cases import TINY
from tests.shared import demo_arguments, demo_bundle, small_demo

SMALL = ["--checkpoint", str(TINY), "--frames", "8", "--engine", "onnxruntime", "--inner-layer", "3", "--quiet"]
ONE_MERGE = ["--merge-layers", "1"]  # plans are most of a small graph, and of the time of its export


@pytest.fixture(scope="module")
def bundle():
    """A verified bundle of a small checkpoint, 8 frames; do not change it."""
    return demo_bundle()


def refused(argv, capsys, command=main):
    """The one sentence on standard error of a command that must fail."""
    status = command([str(x) for x in argv])
    captured = capsys.readouterr()
    assert status == 1, captured
    (line,) = captured.err.strip().splitlines()[-1:]
    assert re.match(r"earlytom-\w+: error: ", line), captured.err
    assert "Traceback" not in captured.err
    return line


def test_a_bundle_holds_what_it_should(bundle):
    found = read_bundle(bundle)
    manifest = found.manifest
    assert set(manifest.files) == {"vision.onnx", "vision.onnx.data", "report.md"}
    assert (manifest.dtype, manifest.config.retain, manifest.config.frames) == ("fp32", 0.25, 8)
    assert manifest.config.inner.layer == 3
    assert manifest.checkpoint["format"] == "transformers"
    assert manifest.tools["torch"] == torch.__version__.split("+")[0]
    assert [hop.status for hop in manifest.parity] == ["passed", "passed"]
    report = (bundle / "report.md").read_text()
    assert "oracle" in report and "onnxruntime" in report.lower()
    assert not list(bundle.parent.glob(".*")), "no temporary directory is left"


def test_the_same_input_gives_the_same_bundle(bundle, tmp_path, capsys):
    """Also in another process, with other hashes and another working directory."""
    again, tensors = tmp_path / "again", tmp_path / "tensors"
    save = ["--save-tensors", str(tensors)]
    command = [Path(sys.executable).with_name("earlytom-export"), *demo_arguments(), "--output", again, *save]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "7"})
    saved = {path.name: path.read_bytes() for path in tensors.iterdir()}
    assert "inputs.json" in saved
    for name in ("vision.onnx", "vision.onnx.data", "report.md", "manifest.json"):
        assert (bundle / name).read_bytes() == (again / name).read_bytes()
    before = {path.name: path.stat().st_mtime_ns for path in again.iterdir()}
    start = time.process_time()  # not the clock on the wall: the machine may be busy
    assert main([*demo_arguments(), "--output", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] is True and time.process_time() - start < 5
    assert {path.name: path.stat().st_mtime_ns for path in again.iterdir()} == before
    shutil.rmtree(tensors)
    assert main([*demo_arguments(), "--output", str(again), "--json", *save]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] is True
    assert {path.name: path.read_bytes() for path in tensors.iterdir()} == saved
    line = refused([*demo_arguments(), "--retain", "0.5", "--output", again], capsys)
    assert "--force" in line or "force" in line
    assert {path.name: path.stat().st_mtime_ns for path in again.iterdir()} == before


SLOW = pytest.mark.slow  # the counts themselves are property-tested: earlytom/test_config.py


@pytest.mark.parametrize(
    ("retain", "frames"),
    [(0.13, 33), *(pytest.param(*case, marks=SLOW) for case in ((0.05, 8), (0.5, 8), (0.2, 20), (0.25, 64)))],
)
def test_token_count_in_manifest_graph_and_output_alike(retain, frames, tmp_path):
    import onnx

    output = tmp_path / "b"
    argv = [*demo_arguments(), *ONE_MERGE, "--frames", str(frames), "--retain", str(retain)]
    assert main([*argv, "--no-verify", "--output", str(output)]) == 0
    found = read_bundle(output)
    budget = found.manifest.config.frame_budgets[-1]
    expected = round(retain * frames * 49 / budget) * budget + 1
    assert found.manifest.counts.tokens == expected
    graph = onnx.load(output / "vision.onnx", load_external_data=False).graph
    (tokens,) = (value for value in graph.output if value.name == "tokens")
    assert [dim.dim_value for dim in tokens.type.tensor_type.shape.dim] == [1, expected, 128]
    with open_runner(found, "onnxruntime") as runner:
        assert runner.run(synthetic_clip(frames, 196)[None]).tokens.shape == (1, expected, 128)


def test_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path, capsys):
    output = tmp_path / "none"
    argv = ["--checkpoint", str(TINY), "--retain", "0.2", "--engine", "onnxruntime", "--inner-layer", "0"]
    assert main([*argv, "--output", str(output), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "[32, 729, 48]" in text and "[20, 729, 48]" in text and "[8, 157, 64]" in text
    assert "6272 -> 1257" in text and "TFLOP" in text and "vision.onnx.data" in text
    assert not output.exists()
    assert main([*argv, "--output", str(output), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stage_frames"] == [32, 20, 12, 8]
    assert plan["tokens"] == {"before": 6272, "after": 1257, "patches_per_frame": 157}
    assert 0 < plan["cost"]["flops_after"] < plan["cost"]["flops_before"]
    assert main([*argv, "--output", str(output), "--dry-run", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "6272 -> 1257 a video" in text and "for a call of 2 videos" in text


def test_the_bare_command_exports_the_demo_and_says_so_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--retain", "0.2", "--dry-run"]) == 0
    captured = capsys.readouterr()
    first = captured.err.splitlines()[0]
    assert "built-in demo" in first and "--checkpoint lmms-lab/llava-onevision-qwen2-7b-ov" in first
    assert "bundles/demo-r0.2" in captured.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--retain", "0"], "retain is 0"),
        (["--retain", "1.5"], "retain is 1.5"),
        (["--retain", "nan"], "retain is nan"),
        (["--frame-budgets", "3,5,2"], "budgets must not grow"),
        (["--merge-layers", "1,2,40"], "merge layer 40 does not exist: the tower has 6 layers"),
        (["--checkpoint", "/no/such/checkpoint"], "there is no checkpoint at /no/such/checkpoint"),
        (["--opset", "12"], "opset 12 cannot be exported"),
        (["--batch", "0"], "batch is 0"),
        (["--inner-layer", "9"], "inner layer 9 does not exist: the LLM has 6 layers"),
        (["--engine", "auto,none"], "auto and none go alone"),
        (["--video", "/no/such/clip.mp4"], "/no/such/clip.mp4"),
        (["--no-verify", "--save-tensors", "tensors"], "the tensors to save are those of verifying"),
    ],
)
def test_bad_settings_get_one_sentence_and_leave_nothing(options, says, tmp_path, capsys):
    output = tmp_path / "deep" / "bundle"
    assert says in refused([*SMALL, "--output", output, *options], capsys)
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints_are_refused(tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    output = tmp_path / "out"
    assert "LlamaForCausalLM" in refused([*demo_arguments(), "--checkpoint", foreign, "--output", output], capsys)
    truncated = tmp_path / "truncated"
    shutil.copytree(TINY, truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused([*demo_arguments(), "--checkpoint", truncated, "--output", output], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "truncated"]


def test_outputs_that_cannot_be_written_are_refused(tmp_path, capsys, monkeypatch):
    full = tmp_path / "mine"
    full.mkdir()
    (full / "thesis.txt").write_text("years")
    for force in ([], ["--force"]):
        assert str(full) in refused([*demo_arguments(), "--output", full, *force], capsys)
    assert (full / "thesis.txt").read_text() == "years"
    file = tmp_path / "file"
    file.write_text("x")
    assert str(file) in refused([*demo_arguments(), "--output", file], capsys)

    import onnx_ir

    def no_space(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_ir, "save", no_space)
    line = refused([*demo_arguments(), *ONE_MERGE, "--no-verify", "--output", tmp_path / "new" / "bundle"], capsys)
    assert "No space left" in line or "disk is full" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


BAD_NAMES = {
    "long": ("x" * 300, "File name too long"),
    "long, below a new directory": ("new/" + "x" * 300, "File name too long"),
    "null": ("a\0b", "without null characters"),
    "no text": ("\udcff", "must be UTF-8"),
    "below a file": ("file/deep/b", "Not a directory"),
    "circle": ("circle", "circle"),
    "a link to a file": ("link", "file"),
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_paths_that_cannot_be_written_are_refused_before_the_work(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("export.run._make_graph", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = sorted(tmp_path.iterdir())
    path, says = f"{tmp_path}/{BAD_NAMES[name][0]}", BAD_NAMES[name][1]
    for options in (["--output", path], ["--output", f"{tmp_path}/b", "--save-tensors", path],
                    ["--output", f"{tmp_path}/b", "--timing-cache", path]):
        assert says in refused([*demo_arguments(), *options], capsys)
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(BundleError, match=r"does not exist|is a file"):
        read_bundle(path)


def test_the_root_is_no_output(capsys):
    assert "the output / is a mount point" in refused([*demo_arguments(), "--output", "/"], capsys)


def test_a_name_as_long_as_can_be_is_an_output(tmp_path):
    output = tmp_path / ("é" * 127)
    with BundleWriter(output) as writer:
        (writer.path / "x").touch()
        assert writer.path.parent == tmp_path and not output.exists()
    assert list(tmp_path.iterdir()) == []


def test_float32_weights_are_loaded_once(tmp_path, monkeypatch):
    loads, load = [], run_module.load
    monkeypatch.setattr(run_module, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    assert main([*demo_arguments(), *ONE_MERGE, "--output", str(tmp_path / "b")]) == 0
    assert len(loads) == 1, "for the graph and to verify it"


def test_a_video_is_decoded_once_and_its_frames_decide(tmp_path, monkeypatch):
    decoded, clip = [], job_module.verification_clips
    monkeypatch.setattr(job_module, "verification_clips", lambda *a, **k: decoded.append(a) or clip(*a, **k))
    video, copy = clips.real("bikes"), tmp_path / "copy.mp4"
    copy.write_bytes(video.read_bytes() + b"trailing bytes")

    def job(*given):
        return job_module.plan_job(filled(ExportOptions, export_parser().parse_args([*demo_arguments(), *given])))

    jobs = [job(), job("--video", str(video)), job("--video", str(copy))]
    assert jobs[1].key == jobs[2].key != jobs[0].key and jobs[1].clips is jobs[1].video
    assert len(decoded) == 2


def fake_build(monkeypatch, content):
    """TensorRT for RTX, as far as earlytom-build sees it."""
    def build_engine(onnx_path, manifest, destination, options, *, progress):
        assert Path(onnx_path).is_file()
        name = engine_file_name(options)
        (Path(destination) / name).write_bytes(content())
        settings = options.settings()
        return EngineRecord(name, options.product, "1.7.1", options.targets, "none", False, None, None, None, settings)

    monkeypatch.setattr("export.build.probe_build", lambda name: "")
    monkeypatch.setattr("export.build.build_engine", build_engine)


def test_an_engine_is_added_without_the_checkpoint_and_replaced(bundle, tmp_path, capsys, monkeypatch):
    output = shutil.copytree(bundle, tmp_path / "b")
    fake_build(monkeypatch, lambda: b"first")
    monkeypatch.setattr("export.run.load", lambda *_, **__: pytest.fail("the checkpoint was read"))
    argv = [str(output), "--engine", "tensorrt-rtx"]
    assert build_main([*argv, "--for", "rtx4090"]) == 0
    assert f"not verified yet: earlytom-verify {output}" in capsys.readouterr().err
    added = add_engine(output, EngineOptions(engine="tensorrt-rtx", targets="sm80"))
    assert [e.file for e in added.manifest.engines] == ["vision.sm89.rtx.engine", "vision.sm80.rtx.engine"]
    fake_build(monkeypatch, lambda: b"second")
    assert build_main([*argv, "--for", "sm89", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert sorted(json.loads(captured.out)["engines"]) == ["vision.sm80.rtx.engine", "vision.sm89.rtx.engine"]
    assert captured.err == ""
    found = read_bundle(output)
    assert found.file("vision.sm89.rtx.engine").read_bytes() == b"second"
    assert [(hop.actual, hop.status) for hop in found.manifest.parity] == [
        ("static", "passed"), ("onnxruntime", "passed"), ("tensorrt-rtx", "not run")
    ]
    report = (output / "report.md").read_text()
    assert "vision.sm89.rtx.engine" in report and "earlytom-verify BUNDLE checks it" in report
    assert {path.name for path in output.iterdir()} == set(found.manifest.files) | {"manifest.json"}
    original = read_bundle(bundle).manifest
    assert all(found.manifest.files[name] == record for name, record in original.files.items() if name != "report.md")


def test_a_build_that_fails_leaves_the_bundle_as_it_was(bundle, tmp_path, capsys, monkeypatch):
    output = shutil.copytree(bundle, tmp_path / "b")
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def no_space():
        raise EngineError("out of memory")

    fake_build(monkeypatch, no_space)
    for options, says in (
        (["--engine", "tensorrt-rtx"], "out of memory"),
        (["--engine", "tensorrt-rtx", "--for", "h100"], "sm90"),
        (["--engine", "tensorrt-rtx", "--strip-weights"], "does not offer strip_weights"),
        (["--engine", "tensorrt", "--timing-cache", "/dev/null/x"], "the timing cache /dev/null/x cannot be"),
    ):
        assert says in refused([output, *options], capsys, build_main)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert "is not a bundle" in refused([tmp_path, "--engine", "tensorrt-rtx"], capsys, build_main)
    for options in ([], ["--engine", "onnxruntime"]):
        with pytest.raises(SystemExit):
            build_main([str(output), *options])
    graph = output / "vision.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    assert "vision.onnx has" in refused([output, "--engine", "tensorrt-rtx"], capsys, build_main)


def test_an_engine_without_its_package_is_refused(tmp_path, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("tensorrt") else real(name, *rest)
    )
    for engine in ("tensorrt", "tensorrt-rtx"):
        line = refused([*demo_arguments(), "--engine", engine, "--output", tmp_path / "b"], capsys)
        assert f"pip install {engine}" in line
    with pytest.raises(SystemExit) as stop:
        main(["--engine", "tensorflow"])
    assert stop.value.code == 2 and "tensorflow" in capsys.readouterr().err


def test_an_engine_for_other_cards_is_built_here_and_not_run_here(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    output = tmp_path / "b"
    argv = [*demo_arguments(), *ONE_MERGE, "--dtype", "fp16", "--engine", "tensorrt-rtx", "--for", "a100,rtx4090"]
    argv += ["--no-verify", "--output", str(output)]
    assert main(argv) == 0
    found = read_bundle(output)
    (engine,) = found.manifest.engines
    assert engine.file == "vision.sm80-sm89.rtx.engine" and engine.targets == ("sm80", "sm89")
    assert (engine.product, engine.gpu) == ("tensorrt-rtx", None) and found.file(engine.file).stat().st_size > 10**6
    report = (output / "report.md").read_text()
    assert "2 of 2 attentions fused" in report, "the last merge layer's too"
    if torch.cuda.is_available():
        return
    ask = ["--bundle", output, "--video", clips.real("bikes"), "--prompt", "What?", "--engine", "tensorrt-rtx"]
    line = refused(["--checkpoint", "demo", *ask], capsys, infer)
    assert "no CUDA device" in line  # the engine is opened before any weights are looked at
    with pytest.raises(EngineError, match=r"no CUDA device.*sm80 \(A100\)"):
        open_runner(found, "tensorrt-rtx")
    with open_runner(found) as runner:
        assert runner.name == "onnxruntime" and any("no CUDA device" in reason for reason in runner.passed)


def test_auto_builds_for_the_a100_where_it_can_and_says_why(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    argv = ["--checkpoint", str(TINY), "--retain", "0.25", "--inner-layer", "0", "--output", str(tmp_path / "b")]
    assert main([*argv, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "auto: tensorrt-rtx is here" in text and "vision.sm80.rtx.engine" in text
    assert main([*argv, "--dry-run", "--engine", "tensorrt-rtx", "--for", "h100"]) == 1
    assert "sm90" in capsys.readouterr().err
    assert main([*argv, "--dry-run", "--engine", "tensorrt-rtx", "--strip-weights"]) == 1
    assert "does not offer strip_weights" in capsys.readouterr().err


def test_damaged_bundles_are_refused_before_anything_runs(bundle, tmp_path, capsys):
    video = clips.real("bikes")
    ask = ["--video", str(video), "--prompt", "What?"]
    truncated = shutil.copytree(bundle, tmp_path / "truncated")
    graph = truncated / "vision.onnx"
    graph.write_bytes(graph.read_bytes()[:-10])
    assert "vision.onnx has" in refused(["--bundle", truncated, *ask], capsys, infer)
    assert "vision.onnx has" in refused([truncated], capsys, verify_main)
    edited = shutil.copytree(bundle, tmp_path / "edited")
    manifest = edited / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"retain": 0.25', '"retain": 0.2500'))
    assert read_bundle(edited)  # the same number: not an edit
    manifest.write_text(manifest.read_text().replace('"retain": 0.25', '"retain": 0.24'))
    assert "edited" in refused(["--bundle", edited, *ask], capsys, infer)
    assert "edited" in refused([edited], capsys, verify_main)
    assert "does not exist" in refused(["--bundle", tmp_path / "nothing", *ask], capsys, infer)


def test_bad_videos_are_refused(bundle, tmp_path, capsys):
    short, corrupt = tmp_path / "short.mp4", tmp_path / "corrupt.mp4"
    clips.write(short, clips.pattern(3))
    corrupt.write_bytes(b"not a video at all" * 100)
    ask = ["--bundle", bundle, "--prompt", "What?", "--video"]
    assert "3 frames" in refused([*ask, short, "--strict-frames"], capsys, infer)
    assert "corrupt.mp4" in refused([*ask, corrupt], capsys, infer)
    assert "corrupt.mp4" in refused([bundle, "--video", corrupt], capsys, verify_main)


def test_verify_passes_again_and_fails_on_other_weights(bundle, tmp_path, capsys):
    assert verify_main([str(bundle), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True and len(result["hops"]) >= 2
    other = shutil.copytree(small_demo(), tmp_path / "other")
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    (name,) = (name for name in weights if "vision" in name and name.endswith("layers.1.mlp.fc1.weight"))
    weights[name] = weights[name] + 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "other weights" in refused([bundle, "--checkpoint", other], capsys, verify_main)


def test_interrupting_leaves_nothing_behind(tmp_path):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        output = tmp_path / "deep" / "bundle"
        code = "import sys; from export.cli import main; sys.exit(main(sys.argv[1:]))"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *[x for x in demo_arguments() if x != "--quiet"], "--output", str(output)],
            stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )
        seen = process.stderr.readline()
        while "rewrite" not in seen:
            assert seen, "the export ended before it could be interrupted"
            seen = process.stderr.readline()
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
        assert process.returncode == status, error
        assert "Traceback" not in error
        assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_tokenizer_cannot_be_asked(bundle, tmp_path, capsys):
    bare = shutil.copytree(small_demo(), tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    ask = ["--bundle", bundle, "--checkpoint", bare, "--video", clips.real("bikes"), "--prompt", "What?"]
    line = refused(ask, capsys, infer)
    assert "no tokenizer" in line


def test_outputs_of_the_bundle_are_the_towers(bundle):
    from earlytom import StaticTower, load

    found = read_bundle(bundle)
    clip = synthetic_clip(8, 196)[None]
    tower = StaticTower(load(small_demo(), parts=("vision",)).vision, found.manifest.config)
    with open_runner(found, "onnxruntime") as runner:
        outputs = runner.run(clip)
    expected = tower(torch.from_numpy(clip))
    assert torch.equal(outputs.positions, expected.positions)
    torch.testing.assert_close(outputs.tokens, expected.tokens, atol=1e-4, rtol=0)


@pytest.mark.parametrize("same", [True, False])
def test_a_calibrated_preset_is_planned_with_and_told_when_it_is_of_other_weights(same, tmp_path):
    digest = load(TINY, device="meta", parts=("vision",)).identity.digest
    origin, path, told = Origin("x", digest if same else "0", 6, 9, 50.0, None), tmp_path / "mine.json", []
    CalibratedPreset("mine", 0.25, 8, (0, 3), (6, 3), 0.4, 6, 0.9, origin).write(path)
    options = ExportOptions(checkpoint=str(TINY), preset=str(path), engine="none", inner_layer=0)
    config = job_module.plan_job(options, told.append).config
    assert (config.frames, config.merge_layers, config.frame_budgets, config.tau) == (8, (0, 3), (6, 3), 0.4)
    assert ["made with other weights (x)" in line for line in told] == ([] if same else [True])
