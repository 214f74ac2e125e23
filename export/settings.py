"""What a user asks of an export, and the one checked configuration it comes to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from earlytom.calibration.preset_file import CalibratedPreset, read_preset
from earlytom.config import METHODS, EarlyTomConfig, InnerMerging
from earlytom.errors import ConfigError
from earlytom.presets import PRESETS, environment_settings, preset, published_inner
from engines.products import COMPATIBILITY, ENGINES

if TYPE_CHECKING:
    from earlytom.checkpoint import CheckpointIdentity

ENGINE_NAMES = ("auto", *(name for name, engine in ENGINES.items() if not engine.needs_weights), "none")


@dataclass(frozen=True)
class EngineOptions:
    """Which engines to build and how: options of `earlytom-export` and of `earlytom-build`, with their defaults.

    engine: of ENGINE_NAMES, separated by commas. The rest is of TensorRT's engines. targets: the cards that TensorRT
    for RTX builds for, such as "a100,rtx4090" or "sm80,sm89"; hardware_compatibility: of COMPATIBILITY;
    version_compatible: later versions run it too; strip_weights: it takes its weights from the graph; workspace: GiB
    that a kernel may use; optimization_level: 0 to 5; timing_cache: a directory for kernel times, kept across builds.
    """

    engine: str = "auto"
    targets: str | None = None
    hardware_compatibility: str = COMPATIBILITY[0]
    version_compatible: bool = False
    strip_weights: bool = False
    workspace: float = 4.0
    optimization_level: int | None = None
    timing_cache: Path | str | None = None


@dataclass(frozen=True)
class ExportOptions(EngineOptions):
    """What to export: the options of `earlytom-export`, by the same names and with the same defaults.

    checkpoint: a directory, a hub id, or "demo". None is what the preset, the checkpoint or the machine decides: retain
    to ema as in EarlyTomConfig; pooling in place of the checkpoint's; inner_layer: LLM layer before which visual tokens
    are merged, 0 for none; from_environment: read the released code's variables as defaults. dtype: of weights and
    activations; batch: videos a call; output: the bundle, by default bundles/<checkpoint>-r<retain>; force: replace an
    earlier one; verify: check parity before writing, on `video` or synthetic clips; save_tensors: a directory for the
    verified tensors in Polygraphy's format; answers, prompts, questions: see `choose_questions`.
    preset: a published one by name, or a calibrated one by its file.
    """

    checkpoint: str = "demo"
    retain: float | None = None
    preset: str = "videomme"
    frames: int | None = None
    merge_layers: tuple[int, ...] | None = None
    frame_budgets: tuple[int, ...] | None = None
    tau: float | None = None
    max_window: int | None = None
    ema: float | None = None
    contextual: float | None = None
    pooling: str | None = None
    inner_layer: int | None = None
    inner_ratio: float | None = None
    inner_method: str = METHODS[0]
    inner_as_released: bool = False
    from_environment: bool = False
    dtype: str = "fp32"
    batch: int = 1
    opset: int | None = None
    output: Path | str | None = None
    force: bool = False
    verify: bool = True
    video: Path | str | None = None
    save_tensors: Path | str | None = None
    answers: bool | None = None
    prompts: Sequence[str] | None = None
    questions: int | None = None


# Options that are settings of the method, by the same name; pooling depends on the checkpoint too.
GIVEN = ({f.name for f in fields(ExportOptions)} & {f.name for f in fields(EarlyTomConfig)}) - {"pooling"}


def resolve(
    options: ExportOptions, identity: CheckpointIdentity, environ: Mapping[str, str] = os.environ
) -> EarlyTomConfig:
    """The configuration for this checkpoint: preset, then environment variables if asked for, then the options.

    Pooling, newlines and the scale of the published layer numbers come from the checkpoint. Raises ConfigError; for a
    calibrated preset also when the tower has another depth, or when other frames or merge layers are asked for than its
    budgets are for.
    """
    settings = environment_settings(environ) if options.from_environment else {}
    settings |= {name: value for name in GIVEN if (value := getattr(options, name)) is not None}
    inner = _inner(options, identity, settings.pop("inner", None))
    calibrated = calibrated_preset(options)
    if calibrated is not None:
        calibrated.check_fits(identity.geometry.layers, settings)
        settings = calibrated.settings | settings
    return preset(
        "videomme" if calibrated else options.preset,  # a calibrated one has all that a published one says
        settings.pop("retain", 0.2),
        model="llava-video" if identity.newline == "grid" else "llava-onevision",
        depth=identity.geometry.layers,
        **(settings | {"pooling": identity.pooling, "newline": identity.newline, "inner": inner}),
    )


def calibrated_preset(options: ExportOptions) -> CalibratedPreset | None:
    """What the file holds that `preset` names, None for a published one. Raises ConfigError."""
    if options.preset in PRESETS:
        return None
    if is_preset_file(options.preset):
        return read_preset(Path(options.preset))
    raise ConfigError(
        f"there is no preset {options.preset!r}: the published ones are {', '.join(PRESETS)}, and a calibrated one is "
        "given by its file, such as preset.json"
    )


def is_preset_file(name: str) -> bool:
    """Whether a preset is named by its file, and not a published one."""
    return name.endswith(".json") or os.sep in name


def _inner(
    options: ExportOptions, identity: CheckpointIdentity, from_environment: InnerMerging | None
) -> InnerMerging | None:
    """What to merge inside the LLM: typed, or from the environment, or as published for an LLM of this depth."""
    layers = identity.language_layers
    published = from_environment or published_inner(layers)
    layer = options.inner_layer
    if layer is None and published is not None:
        layer = published.layer
    if not layer:
        if options.inner_as_released:
            raise ConfigError("there is no inner merging here to be as released: give --inner-layer, or leave that out")
        return None
    published = published or InnerMerging(layer)
    ratio = published.ratio if options.inner_ratio is None else options.inner_ratio
    if layer >= layers:
        raise ConfigError(
            f"inner layer {layer} does not exist: the LLM has {layers} layers, so it must lie in 1..{layers - 1}, "
            "or be 0 for no inner merging"
        )
    return InnerMerging(layer, ratio, options.inner_method, options.inner_as_released)


def merging_text(config: EarlyTomConfig) -> str:
    """The settings of frame merging, for people."""
    return f"tau {config.tau:g}, M {config.max_window}, ema {config.ema:g}"


PROMPTS = ("What happens in this video?", "How many things are there?")  # to any clip
QUESTIONS = 12  # about the demo: a few seconds


@dataclass(frozen=True)
class Questions:
    """What the language model is asked from the visual tokens of both sides of a hop.

    prompts: about the clip that is verified; drawn: how many about drawn clips, which are of the demo's small world.
    """

    prompts: tuple[str, ...] = PROMPTS
    drawn: int = 0


def knows_drawings(format: str, frames: int) -> bool:
    """Whether to ask about drawn clips, which have 4 frames or more: the demo only."""
    return format == "demo" and frames >= 4


def choose_questions(
    answers: bool | None, prompts: Sequence[str] | None, questions: int | None, *, demo: bool
) -> Questions | None:
    """What to ask, or None for nothing.

    answers: whether to ask at all, by default of the demo only: another language model takes long to load and answer,
    unless prompts or questions are given. prompts: own ones, in place of all others. questions: how many, for the demo.
    Raises ConfigError on what contradicts itself.
    """
    if answers is False and (prompts or questions is not None):
        raise ConfigError("there are prompts or a number of questions, and answers are not to be compared: choose one")
    if not (demo if answers is None else answers) and not prompts and questions is None:
        return None
    if prompts:
        if questions is not None:
            raise ConfigError("a number of questions goes with the demo's own: own prompts are all that is asked")
        return Questions(tuple(prompts))
    if questions is not None and not demo:
        raise ConfigError("only of the built-in demo the questions can be drawn by number: give prompts of your own")
    count = QUESTIONS if questions is None else questions
    if count < 1:
        raise ConfigError(f"{count} questions cannot be asked: at least 1")
    return Questions(PROMPTS[:count], max(0, count - len(PROMPTS))) if demo else Questions()
