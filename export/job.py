"""What an export will do: every setting settled and checked, before the work (`plan_job`)."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.checkpoint import CheckpointIdentity, load
from earlytom.config import EarlyTomConfig
from earlytom.dtypes import DTYPES, check_dtype
from earlytom.errors import ConfigError
from earlytom.flops import ModelWork, TowerCost, model_work, tower_cost
from earlytom.shapes import StaticShapes, derive_shapes
from earlytom.video import verification_clips
from engines.bundle.manifest import MODEL, request_key
from engines.paths import named_path
from engines.tensorrt.build import BuildOptions, engine_file_name

from .build import build_options, choose_engines
from .costs import floor_lines, floors, work_lines
from .onnx.exporter import DEFAULT_OPSET, OPSETS
from .settings import (
    ExportOptions,
    Questions,
    calibrated_preset,
    choose_questions,
    knows_drawings,
    merging_text,
    resolve,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOOLS = (
    "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "tensorrt", "tensorrt-rtx", "polygraphy", "transformers",
    "safetensors", "numpy",
)


@dataclass(frozen=True)
class Job:
    """The options of an export and what they come to on this machine, for this checkpoint.

    engines: what to build, in order, and `why` they were chosen; builds: how, for those of TensorRT; video: the frames
    to verify on, uint8 [V, T, H, W, 3], None for synthetic ones; questions: to compare the answers to, None for none.
    """

    options: ExportOptions
    identity: CheckpointIdentity
    config: EarlyTomConfig
    opset: int
    engines: tuple[str, ...]
    why: str
    builds: dict[str, BuildOptions]
    output: Path
    video: NDArray[np.uint8] | None
    questions: Questions | None = None

    @property
    def shapes(self) -> StaticShapes:
        return derive_shapes(self.config, self.identity.geometry, self.options.batch)

    @property
    def clips(self) -> NDArray[np.uint8]:
        """What to verify on: uint8 [V, T, H, W, 3]."""
        if self.video is not None:
            return self.video
        return verification_clips(
            None, frames=self.config.frames, size=self.identity.geometry.image_size, batch=self.options.batch
        )

    @property
    def key(self) -> str:
        """The same for jobs that write the same bundle: of a video, its frames decide, not its file."""
        options = self.options
        video = None if self.video is None else hashlib.sha256(self.video[:1].tobytes()).hexdigest()
        return request_key(
            {
                "config": self.config.to_dict(), "dtype": options.dtype, "batch": options.batch, "opset": self.opset,
                "engines": list(self.engines), "checkpoint": self.identity.to_dict(), "verify": options.verify,
                "video": video, "tools": tools(),
                "questions": None if self.questions is None else asdict(self.questions),
                "builds": {name: build_settings(options) for name, options in self.builds.items()},
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        options, shapes, dtype = self.options, self.shapes, DTYPES[self.options.dtype].torch
        return {
            "checkpoint": self.identity.to_dict(),
            "config": self.config.to_dict(),
            "dtype": options.dtype,
            "batch": options.batch,
            "opset": self.opset,
            "engines": list(self.engines),
            "output": str(self.output),
            "stage_frames": list(shapes.stage_frames),
            "tokens": {"before": self._tokens_before, "after": shapes.tokens, "patches_per_frame": shapes.keep},
            "inputs": {name: [kind, list(shape)] for name, (kind, shape) in shapes.inputs.items()},
            "outputs": {name: [kind, list(shape)] for name, (kind, shape) in shapes.outputs(dtype).items()},
            "cost": self.cost.to_dict(),
            "work": self.work.to_dict(),
            "floors": floors(self.work, options.targets, options.dtype),
            "writes": self._writes(),
        }

    @property
    def cost(self) -> TowerCost:
        """Of one call."""
        return tower_cost(self.config, self.identity.geometry, batch=self.options.batch, dtype=self.options.dtype)

    @property
    def work(self) -> ModelWork:
        """Of one call, and of the tokens after it: vision and LLM, as far as the checkpoint tells the LLM's sizes."""
        return model_work(
            self.config, self.identity.geometry, self.identity.language, batch=self.options.batch,
            dtype=self.options.dtype,
        )

    @property
    def _tokens_before(self) -> int:
        """Of one video, as `shapes.tokens` is."""
        return self.config.frames * self.shapes.pooled_patches

    def _writes(self) -> list[str]:
        engines = [engine_file_name(options) for options in self.builds.values()]
        return [MODEL, f"{MODEL}.data", *engines, "report.md", "manifest.json"]

    def describe(self) -> str:
        """What `--dry-run` prints for people."""
        shapes, cost, batch = self.shapes, self.cost, self.options.batch
        before, after = cost.before.flops.total / 1e12, cost.after.flops.total / 1e12
        call = "" if batch == 1 else f", for a call of {batch} videos"
        layers = ["input", *(f"after layer {layer}" for layer in self.config.merge_layers)]
        rows = [
            f"  {name:<16} [{frames}, {shapes.patches}, {shapes.hidden_size}]"
            for name, frames in zip(layers, shapes.stage_frames)
        ]
        return "\n".join(
            [
                f"checkpoint  {self.identity.name} ({self.identity.format}), {self.options.dtype}, opset {self.opset}",
                f"settings    retain {self.config.retain:g}, {merging_text(self.config)}",
                "frames, patches, width at each stage, for one video:",
                *rows,
                f"  {'selected':<16} [{shapes.final_frames}, {shapes.keep}, {shapes.projector_size}]",
                f"tokens      {self._tokens_before} -> {shapes.tokens} a video ({shapes.visual_tokens} patches, "
                f"{shapes.newlines} newlines at most)",
                f"tower       {before:.3f} -> {after:.3f} TFLOP ({1 - after / before:.0%} fewer){call}",
                *work_lines(self.work),
                *floor_lines(self.work, self.options.targets, self.options.dtype),
                f"memory      weights {cost.weight_bytes / 1e6:.1f} MB, activations at most "
                f"{cost.before.activation_bytes / 1e6:.0f} -> {cost.after.activation_bytes / 1e6:.0f} MB{call}",
                f"engines     {', '.join(self.engines) or 'none'} ({self.why})",
                f"would write {self.output}: {', '.join(self._writes())}",
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


def plan_job(options: ExportOptions, tell: Callable[[str], None] | None = None) -> Job:
    """Read the checkpoint's headers and settle every setting. Raises EarlyTomError on whatever cannot be done.

    tell: is given what a person should know of the preset and of the video's frames, line by line.
    """
    check_dtype(options.dtype)
    opset = DEFAULT_OPSET if options.opset is None else options.opset
    if opset not in OPSETS:
        raise ConfigError(f"opset {opset} cannot be exported, choose one of {', '.join(map(str, OPSETS))}")
    if options.save_tensors is not None and not options.verify:
        raise ConfigError("the tensors to save are those of verifying, which is left out: choose one of the two")
    if not options.verify and (options.answers or options.prompts or options.questions is not None):
        raise ConfigError("answers are compared in verifying, which is left out: choose one of the two")
    identity = load(options.checkpoint, device="meta", parts=("vision",), pooling=options.pooling).identity
    config = resolve(options, identity)
    calibrated = calibrated_preset(options)
    if tell is not None and calibrated is not None and calibrated.made_from.digest != identity.digest:
        made = calibrated.made_from.checkpoint
        tell(f"the preset {calibrated.name} was made with other weights ({made}): this one may need other budgets")
    derive_shapes(config, identity.geometry, options.batch)
    questions = choose_questions(
        options.answers, options.prompts, options.questions, demo=knows_drawings(identity.format, config.frames)
    ) if options.verify else None
    engines, why = choose_engines(options.engine)
    builds = build_options(options, engines)
    output = options.output
    if output is None:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(identity.name).name).strip("-") or "checkpoint"
        output = Path("bundles") / f"{name}-r{config.retain:g}"
    named_path(output, "the output")
    video = None
    if options.video is not None:
        video = verification_clips(
            Path(options.video), frames=config.frames, size=identity.geometry.image_size, batch=options.batch,
            tell=tell,
        )
    return Job(options, identity, config, opset, engines, why, builds, Path(output), video, questions)
