"""One export, from settings to a bundle: what will be done (`plan_job`), and doing it (`run_job`)."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.checkpoint import CheckpointIdentity, load
from earlytom.config import EarlyTomConfig
from earlytom.dtypes import DTYPES, torch_dtype
from earlytom.errors import ConfigError, ParityError
from earlytom.shapes import StaticShapes, derive_shapes
from earlytom.video import read_frames, verification_clips
from engines.bundle.manifest import MODEL, Manifest, request_key
from engines.bundle.reader import Bundle, find_same, read_bundle
from engines.bundle.writer import BundleWriter

from .progress import Progress
from .settings import resolve

if TYPE_CHECKING:
    import torch

    from earlytom.vision.siglip import Vision
    from engines.tensorrt.build import BuildOptions

    from .verify import ParityReport

TOOLS = (
    "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "tensorrt", "tensorrt-rtx", "polygraphy", "transformers",
    "safetensors", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Everything an export needs to know, checked; see the options of `earlytom-export`.

    engines: what to build, in order, and `why` they were chosen; builds: how, for those of TensorRT; key: the same for
    runs that write the same bundle.
    """

    checkpoint: str
    identity: CheckpointIdentity
    config: EarlyTomConfig
    dtype: str
    batch: int
    opset: int
    engines: tuple[str, ...]
    why: str
    builds: dict[str, BuildOptions]
    output: Path
    force: bool
    verify: bool
    video: Path | None
    save_tensors: Path | None
    quiet: bool

    @property
    def shapes(self) -> StaticShapes:
        return derive_shapes(self.config, self.identity.geometry, self.batch)

    @property
    def key(self) -> str:
        video = None if self.video is None else hashlib.sha256(self.video.read_bytes()).hexdigest()
        return request_key(
            {
                "config": self.config.to_dict(), "dtype": self.dtype, "batch": self.batch, "opset": self.opset,
                "engines": list(self.engines), "checkpoint": self.identity.to_dict(), "verify": self.verify,
                "video": video, "tools": tools(),
                "builds": {name: build_settings(options) for name, options in self.builds.items()},
            }
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        from earlytom.flops import tower_cost

        shapes = self.shapes
        return {
            "checkpoint": self.identity.to_dict(),
            "config": self.config.to_dict(),
            "dtype": self.dtype,
            "batch": self.batch,
            "opset": self.opset,
            "engines": list(self.engines),
            "output": str(self.output),
            "stage_frames": list(shapes.stage_frames),
            "tokens": {"before": self._tokens_before, "after": shapes.tokens, "patches_per_frame": shapes.keep},
            "inputs": {name: [dtype, list(shape)] for name, (dtype, shape) in shapes.inputs.items()},
            "outputs": {n: [kind, list(shape)] for n, (kind, shape) in shapes.outputs(DTYPES[self.dtype].torch).items()},
            "cost": tower_cost(
                self.config, self.identity.geometry, batch=self.batch, dtype=self.dtype
            ).to_dict(),
            "writes": self._writes(),
        }

    @property
    def _tokens_before(self) -> int:
        return self.batch * self.config.frames * self.shapes.pooled_patches

    def _writes(self) -> list[str]:
        from engines.tensorrt.build import engine_file_name

        engines = [engine_file_name(options) for options in self.builds.values()]
        return [MODEL, f"{MODEL}.data", *engines, "report.md", "manifest.json"]

    def describe(self) -> str:
        """What `--dry-run` prints for people."""
        plan, shapes = self.to_dict(), self.shapes
        cost = plan["cost"]
        layers = ["input", *(f"after layer {layer}" for layer in self.config.merge_layers)]
        rows = [
            f"  {name:<16} [{frames}, {shapes.patches}, {shapes.hidden_size}]"
            for name, frames in zip(layers, shapes.stage_frames)
        ]
        return "\n".join(
            [
                f"checkpoint  {self.identity.name} ({self.identity.format}), {self.dtype}, opset {self.opset}",
                f"settings    retain {self.config.retain:g}, tau {self.config.tau:g}, M {self.config.max_window}, "
                f"ema {self.config.ema:g}",
                "frames, patches, width at each stage, for one video:",
                *rows,
                f"  {'selected':<16} [{shapes.final_frames}, {shapes.keep}, {shapes.projector_size}]",
                f"tokens      {self._tokens_before} -> {shapes.tokens} ({shapes.visual_tokens} patches, "
                f"{shapes.newlines} newlines at most)",
                f"tower       {cost['flops_before'] / 1e12:.3f} -> {cost['flops_after'] / 1e12:.3f} TFLOP "
                f"({1 - cost['flops_after'] / cost['flops_before']:.0%} fewer)",
                f"memory      weights {cost['weight_bytes'] / 1e6:.1f} MB, activations at most "
                f"{cost['activation_bytes_before'] / 1e6:.0f} -> {cost['activation_bytes_after'] / 1e6:.0f} MB",
                f"engines     {', '.join(self.engines) or 'none'} ({self.why})",
                f"would write {self.output}: {', '.join(plan['writes'])}",
            ]
        )


def build_settings(options: BuildOptions) -> dict[str, Any]:
    """What of a build's options changes the engine: not where its timing cache lies."""
    return {name: value for name, value in options.to_dict().items() if name != "timing_cache"}


def tools() -> dict[str, str]:
    """Versions that decide what is written: ours, Python's, and those of the packages that take part."""
    found = {"earlytom-export": metadata.version("earlytom-export"), "python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def plan_job(arguments: argparse.Namespace) -> Job:
    """Read the checkpoint's headers and settle every setting. Raises EarlyTomError on whatever cannot be done."""
    from .build import build_options, choose_engines

    if arguments.checkpoint == "demo" and not arguments.quiet:
        from .cli import REAL_CHECKPOINT

        note(
            "Exporting the built-in demo checkpoint: real geometry, random weights, answers that mean nothing. For a "
            f"real one: earlytom-export --checkpoint {REAL_CHECKPOINT} --retain 0.2 --dtype fp16"
        )
    identity = load(arguments.checkpoint, device="meta", parts=("vision",), pooling=arguments.pooling).identity
    config = resolve(arguments, identity)
    derive_shapes(config, identity.geometry, arguments.batch)
    engines, why = choose_engines(arguments.engine.split(","))
    from .onnx.exporter import DEFAULT_OPSET, OPSETS

    opset = DEFAULT_OPSET if arguments.opset is None else arguments.opset
    if opset not in OPSETS:
        raise ConfigError(f"opset {opset} cannot be exported, choose one of {', '.join(map(str, OPSETS))}")
    if arguments.video is not None:
        # Refuse a bad file before the work.
        read_frames(arguments.video, frames=config.frames, size=identity.geometry.image_size)
    output = arguments.output
    if output is None:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(identity.name).name).strip("-") or "checkpoint"
        output = Path("bundles") / f"{name}-r{config.retain:g}"
    return Job(
        checkpoint=arguments.checkpoint,
        identity=identity,
        config=config,
        dtype=arguments.dtype,
        batch=arguments.batch,
        opset=opset,
        engines=engines,
        why=why,
        builds=build_options(arguments, engines),
        output=output,
        force=arguments.force,
        verify=arguments.verify,
        video=arguments.video,
        save_tensors=arguments.save_tensors,
        quiet=arguments.quiet,
    )


def run_job(job: Job) -> dict[str, Any]:
    """Write the bundle, or recognise that it is there. Returns what `--json` prints. Raises EarlyTomError."""
    import torch

    from earlytom.tower import StaticTower

    from .build import build_engines
    from .onnx.check import check_graph
    from .onnx.exporter import ATTENTION_OPSET, export_tower
    from .report import render_report
    from .verify import verify_bundle

    progress = Progress(quiet=job.quiet)
    key = job.key
    same = find_same(job.output, key)
    if same is not None:
        progress.say(f"{job.output} is this export already, nothing to do")
        return _result(same, skipped=True, seconds={})
    if not job.verify:
        progress = Progress(progress.stages[:-1], quiet=job.quiet)
    with BundleWriter(job.output, force=job.force) as writer:
        with progress.stage("load"):
            progress.step(job.identity.name)
            vision = _vision(job, torch_dtype(job.dtype))
        with progress.stage("rewrite"):
            tower = StaticTower(vision, job.config, batch=job.batch).eval()
        with progress.stage("export"):
            exported = export_tower(tower, writer.path / MODEL, opset=job.opset, progress=progress.step)
        with progress.stage("check"):
            summary = check_graph(writer.path / MODEL, dtype=job.dtype, opset=job.opset)
        del tower, vision
        manifest = Manifest.derive(
            job.config, job.identity.geometry, dtype=job.dtype, batch=job.batch, opset=job.opset,
            attention="fused" if job.opset >= ATTENTION_OPSET else "primitives",
            checkpoint=job.identity.to_dict(), tools=tools(),
            traced=exported.traced, request_key=key,
        )  # fmt: skip
        with progress.stage("build"):
            records = build_engines(job, Bundle(writer.path, manifest), progress)
            manifest = replace(manifest, engines=records)
        report: ParityReport | None = None
        if job.verify:
            with progress.stage("verify"):
                full = _vision(job, torch.float32)
                frames = verification_clips(
                    job.video, frames=job.config.frames, size=job.identity.geometry.image_size, batch=job.batch
                )
                report = verify_bundle(
                    Bundle(writer.path, manifest), frames, vision=full, save_tensors=job.save_tensors,
                    progress=progress.step,
                )  # fmt: skip
            manifest = replace(manifest, parity=report.hops)
        text = render_report(manifest, summary)
        (writer.path / "report.md").write_text(text, encoding="utf-8")
        if report is not None and not report.passed:
            progress.say(text)
            raise ParityError(f"parity failed, so no bundle was written: {report.reason}")
        bundle = writer.commit(manifest)
    result = _result(bundle, skipped=False, seconds=progress.seconds)
    progress.say(
        f"wrote {job.output}: {result['tokens']} visual tokens a video, "
        + ("parity passed" if job.verify else "not verified")
        + f", engines {', '.join(job.engines) or 'none'}; report.md says more"
    )
    return result


def verify_again(arguments: argparse.Namespace) -> tuple[bool, str]:
    """`earlytom-verify`: whether every hop passed, and the report to print. Raises EarlyTomError."""
    from .report import render_report
    from .verify import verify_bundle

    bundle = read_bundle(arguments.bundle)
    manifest = bundle.manifest
    frames = verification_clips(
        arguments.video, frames=manifest.config.frames, size=manifest.geometry.image_size, batch=manifest.batch
    )
    progress = Progress(("verify",), quiet=arguments.quiet or arguments.json)
    with progress.stage("verify"):
        report = verify_bundle(
            bundle, frames, checkpoint=arguments.checkpoint, save_tensors=arguments.save_tensors, progress=progress.step
        )
    if arguments.json:
        hops = [hop.to_dict() for hop in report.hops]
        return report.passed, json.dumps({"passed": report.passed, "hops": hops}, indent=2)
    return report.passed, render_report(replace(manifest, parity=report.hops))


def _vision(job: Job, dtype: torch.dtype) -> Vision:
    vision = load(job.checkpoint, dtype=dtype, parts=("vision",), pooling=job.identity.pooling).vision
    assert vision is not None
    return vision


def _result(bundle: Bundle, *, skipped: bool, seconds: dict[str, float]) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path), "skipped": skipped, "tokens": manifest.counts.tokens,
        "files": {name: record.bytes for name, record in sorted(manifest.files.items())},
        "engines": [engine.file for engine in manifest.engines],
        "parity": [hop.to_dict() for hop in manifest.parity], "seconds": seconds,
    }  # fmt: skip


def note(text: str) -> None:
    """A line for people, beside what is printed for programs."""
    import sys

    print(text, file=sys.stderr, flush=True)
