"""Which engines an export builds, and building them: the graph opened by ONNX Runtime, engines by TensorRT."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from earlytom.errors import ConfigError, EngineError
from engines.bundle.manifest import MODEL, EngineRecord
from engines.bundle.reader import Bundle
from engines.products import ENGINES, PRODUCTS, parse_targets, product_of
from engines.tensorrt.build import BuildOptions, build_engine, probe_build
from engines.tensorrt.inspect import EngineSummary, inspect_file, inspect_plan

from .progress import Progress
from .settings import ENGINE_NAMES, EngineOptions


def choose_engines(engine: str) -> tuple[tuple[str, ...], str]:
    """The engines to build for `engine`, a name or several with commas, and why these.

    auto: on a card with full TensorRT, an engine tuned there; else, with TensorRT for RTX, engines for other cards,
    built ahead of time; ONNX Runtime always. Raises EngineError when one asked for by name cannot be built here,
    ConfigError for unknown names, or when auto or none come with others.
    """
    names = tuple(dict.fromkeys(engine.split(",")))
    unknown = [name for name in names if name not in ENGINE_NAMES]
    if unknown:
        raise ConfigError(f"engine {', '.join(map(repr, unknown))} is not one of {', '.join(ENGINE_NAMES)}")
    if len(names) > 1 and {"auto", "none"} & set(names):
        raise ConfigError(f"--engine {','.join(names)}: auto and none go alone")
    if names == ("none",):
        return (), "none was asked for"
    if names != ("auto",):
        for name in names:
            require(name)
        return names, "asked for"
    reasons = []
    for name in PRODUCTS:
        try:
            require(name)
        except EngineError as error:
            reasons.append(str(error))
        else:
            ahead = product_of(name).ahead_of_time
            where = "built ahead of time, no GPU needed" if ahead else "tuned on this machine's card"
            return ("onnxruntime", name), f"auto: {name} is here, {where}"
    return ("onnxruntime",), "auto: " + "; ".join(reasons)


def require(name: str) -> None:
    """Raise EngineError, with what to do, unless this machine can build this engine."""
    if name in PRODUCTS:
        probe_build(name)
    elif importlib.util.find_spec(ENGINES[name].module) is None:
        raise EngineError(f"the engine {name} needs its package, which is not here: {ENGINES[name].install}")


def build_options(options: EngineOptions, names: Sequence[str]) -> dict[str, BuildOptions]:
    """How each TensorRT engine among `names` is to be built. Raises EngineError, ConfigError.

    Without targets, auto builds for the A100 and an engine asked for by name for all cards that it can.
    """
    built = {}
    for name in (name for name in names if name in PRODUCTS):
        cards = options.targets
        if cards is None and options.engine == "auto" and product_of(name).ahead_of_time:
            cards = "a100"
        built[name] = BuildOptions(
            product=name,
            targets=parse_targets(cards, name),
            workspace=round(options.workspace * 2**30) if math.isfinite(options.workspace) else 0,
            optimization_level=options.optimization_level,
            timing_cache=None if options.timing_cache is None else Path(options.timing_cache),
            hardware_compatibility=options.hardware_compatibility,
            version_compatible=options.version_compatible,
            strip_weights=options.strip_weights,
        )
    return built


def build_engines(
    bundle: Bundle, names: Sequence[str], builds: Mapping[str, BuildOptions], progress: Progress
) -> tuple[EngineRecord, ...]:
    """Open the bundle's graph in ONNX Runtime where that is wanted, and build the TensorRT engines beside it.

    The bundle is still being written: its manifest has no files yet. Raises EngineError.
    """
    manifest, records = bundle.manifest, []
    for name in names:
        progress.step(name)
        if name == "onnxruntime":
            from engines.onnxruntime import OnnxRuntimeRunner  # with torch, which a build does not need

            OnnxRuntimeRunner(bundle.path / MODEL, manifest.inputs, manifest.outputs).close()
        else:
            records.append(build_one(bundle, builds[name], bundle.path, progress))
    return tuple(records)


def build_one(bundle: Bundle, options: BuildOptions, folder: Path, progress: Progress) -> EngineRecord:
    """Write a TensorRT engine for the bundle's graph into `folder`, and look at what was built. Raises EngineError."""
    manifest, name = bundle.manifest, options.product
    record = build_engine(bundle.path / MODEL, manifest, folder, options, progress=partial(_step, progress, name))
    progress.step(f"{name}: look at what was built")
    summary = look_at(bundle, record, folder)
    if manifest.dtype != "fp32":  # TensorRT has no fused attention in float32, so there it is no news
        for warning in summary.warnings:
            progress.say(f"warning: {record.file}: {warning}")
    return replace(record, settings=replace(record.settings, inspected=summary.inspection()))


def look_at(bundle: Bundle, record: EngineRecord, folder: Path) -> EngineSummary:
    """Which kernels do attention: an engine built on this machine's card is asked, of one built ahead the file is read.

    The latter on a machine that has the card too, so that the same export writes the same bundle everywhere.
    """
    path = folder / record.file
    if product_of(record.product).ahead_of_time:
        return inspect_plan(path, bundle.manifest)
    graph = bundle.path / MODEL if record.settings.strip_weights else None
    return inspect_file(path, record.product, bundle.manifest, graph)


def _step(progress: Progress, name: str, step: str) -> None:
    progress.step(f"{name}: {step}")
