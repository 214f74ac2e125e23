"""Making a bundle, checking it again, and adding an engine to it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from earlytom.checkpoint import load
from earlytom.dtypes import torch_dtype
from earlytom.errors import BundleError, ConfigError, ParityError
from earlytom.parity import HopReport, ParityReport
from earlytom.tower import StaticTower
from earlytom.video import verification_clips
from earlytom.vision.siglip import Vision
from engines.bundle.manifest import MODEL, Manifest
from engines.bundle.reader import Bundle, find_same, read_bundle
from engines.bundle.writer import BundleWriter, update_bundle
from engines.paths import check_directory
from engines.products import PRODUCTS

from .build import build_engines, build_one, build_options, require
from .job import Job, plan_job, tools
from .onnx.check import GraphSummary, check_graph
from .onnx.exporter import export_tower
from .progress import Progress
from .report import render_report
from .settings import EngineOptions, ExportOptions, choose_questions, knows_drawings
from .verify import verify_bundle
from .verify.ladder import ONNXRUNTIME, STATIC

REPORT = "report.md"


@dataclass(frozen=True)
class Result:
    """What a run made. skipped: the bundle was there already; seconds: of each stage."""

    bundle: Bundle
    skipped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        manifest = self.bundle.manifest
        return {
            "bundle": str(self.bundle.path), "skipped": self.skipped, "tokens": manifest.counts.tokens,
            "files": {name: record.bytes for name, record in sorted(manifest.files.items())},
            "engines": [engine.file for engine in manifest.engines],
            "parity": [hop.to_dict() for hop in manifest.parity], "seconds": self.seconds,
        }


def export(options: ExportOptions, *, progress: Progress | None = None) -> Bundle:
    """Write the bundle that `options` ask for, or recognise that it is there: what `earlytom-export` does.

    progress: told what is being done, by default nobody. Raises EarlyTomError: ConfigError and CheckpointError before
    the work, ExportError, EngineError, ParityError, BundleError; then nothing is left behind.
    """
    progress = progress or Progress(quiet=True)
    return run_job(plan_job(options, progress.say), progress).bundle


def run_job(job: Job, progress: Progress) -> Result:
    """As `export`, for a job that is planned."""
    options = job.options
    check_folders(options.timing_cache, options.save_tensors)
    same = find_same(job.output, job.key)
    if same is not None:
        return _found(job, same, progress)
    if not options.verify:
        progress.stages = progress.stages[:-1]
    with BundleWriter(job.output, force=options.force) as writer:
        vision, manifest, summary = _make_graph(job, writer.path, progress)
        with progress.stage("build"):
            records = build_engines(Bundle(writer.path, manifest), job.engines, job.builds, progress)
            manifest = replace(manifest, engines=records)
        report = _verify(job, Bundle(writer.path, manifest), vision, progress) if options.verify else None
        if report is not None:
            # Where the saved tensors lie is told to who asked for them, and nothing of the bundle's.
            manifest = replace(manifest, parity=tuple(replace(hop, repeat="") for hop in report.hops))
        text = render_report(manifest, summary)
        (writer.path / REPORT).write_text(text, encoding="utf-8")
        if report is not None and not report.passed:
            progress.say(text)
            raise ParityError(f"parity failed, so no bundle was written: {report.reason}")
        bundle = writer.commit(manifest)
    progress.say(
        f"wrote {job.output}: {manifest.counts.tokens} visual tokens a video, "
        + ("parity passed" if options.verify else "not verified")
        + f", engines {', '.join(job.engines) or 'none'}; report.md says more"
    )
    return Result(bundle, seconds=progress.seconds)


def check_folders(timing_cache: Path | str | None = None, save_tensors: Path | str | None = None) -> None:
    """Raise ConfigError where a folder that is asked for cannot be written to: before the work."""
    for folder, what in ((timing_cache, "the timing cache"), (save_tensors, "the folder for tensors")):
        if folder is not None:
            check_directory(folder, what)


def _found(job: Job, bundle: Bundle, progress: Progress) -> Result:
    """An earlier run made this very bundle; tensors to save it does not hold, so they are made again."""
    save = job.options.save_tensors is not None
    progress.say(f"{job.output} is this export already, nothing to do{' but save the tensors' if save else ''}")
    if save:
        progress.stages = progress.stages[-1:]
        report = _verify(job, bundle, None, progress)
        if not report.passed:
            raise ParityError(f"parity failed, which passed when {bundle.path} was made: {report.reason}")
    return Result(bundle, skipped=True, seconds=progress.seconds)


def _make_graph(job: Job, folder: Path, progress: Progress) -> tuple[Vision | None, Manifest, GraphSummary]:
    """Write the graph into `folder`. With the weights, where they serve to verify too: those in float32."""
    options, path = job.options, folder / MODEL
    with progress.stage("load"):
        progress.step(job.identity.name)
        vision = _weights(job, torch_dtype(options.dtype))
    with progress.stage("rewrite"):
        tower = StaticTower(vision, job.config, batch=options.batch).eval()
    with progress.stage("export"):
        exported = export_tower(tower, path, opset=job.opset, progress=progress.step)
    with progress.stage("check"):
        summary = check_graph(path, dtype=options.dtype, opset=job.opset)
    manifest = Manifest.derive(
        job.config, job.identity.geometry, dtype=options.dtype, batch=options.batch, opset=job.opset,
        attention=exported.attention, checkpoint=job.identity.to_dict(), tools=tools(), traced=exported.traced,
        request_key=job.key,
    )
    return (vision if options.verify and vision.dtype == torch.float32 else None), manifest, summary


def _weights(job: Job, dtype: torch.dtype) -> Vision:
    vision = load(job.options.checkpoint, dtype=dtype, parts=("vision",), pooling=job.identity.pooling).vision
    assert vision is not None
    return vision


def _verify(job: Job, bundle: Bundle, vision: Vision | None, progress: Progress) -> ParityReport:
    with progress.stage("verify"):
        full = _weights(job, torch.float32) if vision is None else vision
        folder = job.options.save_tensors
        return verify_bundle(
            bundle, job.clips, vision=full, checkpoint=job.options.checkpoint, questions=job.questions,
            save_tensors=None if folder is None else Path(folder), progress=progress.step,
        )


def verify_again(
    bundle: Bundle, *, video: Path | None = None, checkpoint: str | None = None, save_tensors: Path | None = None,
    answers: bool | None = None, prompts: Sequence[str] | None = None, questions: int | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Measure a bundle's parity on another clip or machine: what `earlytom-verify` does. Raises EarlyTomError."""
    check_folders(save_tensors=save_tensors)
    manifest, progress = bundle.manifest, progress or Progress(("verify",), quiet=True)
    demo = knows_drawings(manifest.checkpoint["format"], manifest.config.frames)
    asked = choose_questions(answers, prompts, questions, demo=demo)
    frames = verification_clips(
        video, frames=manifest.config.frames, size=manifest.geometry.image_size, batch=manifest.batch,
        tell=progress.say,
    )
    with progress.stage("verify"):
        return verify_bundle(
            bundle, frames, checkpoint=checkpoint, questions=asked, save_tensors=save_tensors, progress=progress.step
        )


def add_engine(bundle: Bundle | Path | str, options: EngineOptions, *, progress: Progress | None = None) -> Bundle:
    """Build a TensorRT engine from a bundle's graph and put it into the bundle: what `earlytom-build` does.

    options.engine: one product, tensorrt or tensorrt-rtx. No checkpoint is needed. An engine with the same file name is
    replaced. The bundle says of the new one that it was not verified, which needs the weights: `verify_again`.

    Raises BundleError, ConfigError, EngineError; the bundle is then what it was.
    """
    progress = progress or Progress(("read", "build"), quiet=True)
    if options.engine not in PRODUCTS:
        raise ConfigError(f"engine {options.engine!r} cannot be built, it must be one of {', '.join(PRODUCTS)}")
    require(options.engine)
    build = build_options(options, (options.engine,))[options.engine]
    check_folders(build.timing_cache)
    with progress.stage("read"):
        bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        manifest = bundle.manifest
        summary = check_graph(bundle.file(MODEL), dtype=manifest.dtype, opset=manifest.opset)
    try:
        folder = tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=bundle.path)
    except OSError as error:
        raise BundleError(f"the bundle {bundle.path} cannot be written to: {error.strerror}") from None
    with folder as name, progress.stage("build"):
        record = build_one(bundle, build, Path(name), progress)
        engines = (*(e for e in manifest.engines if e.file != record.file), record)
        manifest = replace(manifest, engines=engines, parity=_unverified(manifest, options.engine))
        report = render_report(manifest, summary)
        files: dict[str, Path | bytes] = {record.file: Path(name) / record.file, REPORT: report.encode()}
        return update_bundle(bundle, add=files, engines=[record], parity=manifest.parity)


def _unverified(manifest: Manifest, product: str) -> tuple[HopReport, ...]:
    """The manifest's parity without what was measured with earlier engines of this product."""
    if not manifest.parity:
        return ()
    others = [hop for hop in manifest.parity if hop.actual != product]
    reference = ONNXRUNTIME if any(hop.actual == ONNXRUNTIME for hop in others) else STATIC
    reason = "the engine was added after the bundle was verified: earlytom-verify BUNDLE checks it"
    return (*others, HopReport(reference, product, manifest.dtype, "not run", (reason,)))
