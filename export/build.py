"""Which engines an export builds, and building them: the graph opened by ONNX Runtime, engines by TensorRT."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from earlytom.errors import ConfigError, EngineError
from engines.bundle.manifest import MODEL, EngineRecord
from engines.bundle.reader import Bundle

from .progress import Progress

if TYPE_CHECKING:
    from engines.tensorrt.build import BuildOptions
    from engines.tensorrt.inspect import EngineSummary

    from .job import Job

TENSORRT = ("tensorrt", "tensorrt-rtx")


def choose_engines(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The engines to build for `--engine`, and why these.

    auto: on a card with full TensorRT, an engine tuned there; else, with TensorRT for RTX, engines for other cards,
    built ahead of time; ONNX Runtime always. Raises EngineError when one asked for by name cannot be built here,
    ConfigError when auto or none come with others.
    """
    names = tuple(dict.fromkeys(names))
    if len(names) > 1 and {"auto", "none"} & set(names):
        raise ConfigError(f"--engine {','.join(names)}: auto and none go alone")
    if names == ("none",):
        return (), "none was asked for"
    if names != ("auto",):
        for name in names:
            require(name)
        return names, "asked for"
    reasons = []
    for name in TENSORRT:
        try:
            require(name)
        except EngineError as error:
            reasons.append(str(error))
        else:
            where = "tuned on this machine's card" if name == "tensorrt" else "built ahead of time, no GPU needed"
            return ("onnxruntime", name), f"auto: {name} is here, {where}"
    return ("onnxruntime",), "auto: " + "; ".join(reasons)


def require(name: str) -> None:
    """Raise EngineError, with what to do, unless this machine can build this engine."""
    if name in TENSORRT:
        from engines.tensorrt.build import probe_build

        probe_build(name)
    elif importlib.util.find_spec("onnxruntime") is None:
        raise EngineError("the engine onnxruntime needs its package, which is not here: pip install onnxruntime")


def build_options(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, BuildOptions]:
    """How each TensorRT engine among `names` is to be built. Raises EngineError, ConfigError.

    Without --for, auto builds for the A100 and an engine asked for by name for all cards that it can.
    """
    from engines.products import parse_targets
    from engines.tensorrt.build import BuildOptions

    options = {}
    for name in (name for name in names if name in TENSORRT):
        cards = arguments.targets
        if cards is None and arguments.engine == "auto" and name == "tensorrt-rtx":
            cards = "a100"
        options[name] = BuildOptions(
            product=name,
            targets=parse_targets(cards, name),
            workspace=round(arguments.workspace * 2**30) if math.isfinite(arguments.workspace) else 0,
            optimization_level=arguments.optimization_level,
            timing_cache=arguments.timing_cache,
            hardware_compatibility=arguments.hardware_compatibility,
            version_compatible=arguments.version_compatible,
            strip_weights=arguments.strip_weights,
        )
    return options


def build_engines(job: Job, bundle: Bundle, progress: Progress) -> tuple[EngineRecord, ...]:
    """Open the bundle's graph in ONNX Runtime where that is wanted, and build the TensorRT engines beside it.

    The bundle is still being written: its manifest has no files yet. Raises EngineError.
    """
    manifest, records = bundle.manifest, []
    for name in job.engines:
        progress.step(name)
        if name == "onnxruntime":
            from engines.onnxruntime import OnnxRuntimeRunner

            OnnxRuntimeRunner(bundle.path / MODEL, manifest.inputs, manifest.outputs).close()
        else:
            from engines.tensorrt.build import build_engine

            record = build_engine(
                bundle.path / MODEL, manifest, bundle.path, job.builds[name], progress=partial(_step, progress, name)
            )
            progress.step(f"{name}: look at what was built")
            summary = look_at(bundle, record)
            if manifest.dtype != "fp32":  # TensorRT has no fused attention in float32, so there it is no news
                for warning in summary.warnings:
                    progress.say(f"warning: {record.file}: {warning}")
            records.append(replace(record, settings=replace(record.settings, inspected=summary.inspection())))
    return tuple(records)


def look_at(bundle: Bundle, record: EngineRecord) -> EngineSummary:
    """Which kernels do attention: an engine built on this machine's card is asked, of one built ahead the file is read.

    The latter on a machine that has the card too, so that the same export writes the same bundle everywhere.
    """
    from engines.products import product_of
    from engines.tensorrt.inspect import inspect_file, inspect_plan

    path = bundle.path / record.file
    if product_of(record.product).ahead_of_time:
        return inspect_plan(path, bundle.manifest)
    graph = bundle.path / MODEL if record.settings.strip_weights else None
    return inspect_file(path, record.product, bundle.manifest, graph)


def _step(progress: Progress, name: str, step: str) -> None:
    progress.step(f"{name}: {step}")
