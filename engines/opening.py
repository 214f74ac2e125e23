"""The choice of an engine: the one asked for, or the best that this machine can run."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from earlytom.adaptive import AdaptiveTower
from earlytom.dtypes import torch_dtype
from earlytom.errors import ConfigError, EarlyTomError, EngineError, first_line

from .bundle.reader import Bundle, read_bundle
from .products import ENGINES, PRODUCTS, build_command
from .runner import OpenOptions, Runner

if TYPE_CHECKING:
    from earlytom.pipeline import VideoPipeline

# Engine -> the file of ours that runs it, with `probe` and `open_bundle` (runner.py).
HOMES = {"tensorrt": "engines.tensorrt.runner", "tensorrt-rtx": "engines.tensorrt.runner",
         "onnxruntime": "engines.onnxruntime", "torch": "engines.pytorch"}
FRAME_BUDGETS = ("bundle", "data")


@dataclass(frozen=True)
class Availability:
    """Whether this machine can run an engine; detail: with what, or why not and what would help."""

    name: str
    available: bool
    detail: str


def available_engines() -> tuple[Availability, ...]:
    """What this machine can run, best first; a bundle may still lack what an engine needs."""
    found = []
    for name in ENGINES:
        try:
            found.append(Availability(name, True, _load(name).probe(name)))
        except EngineError as error:
            found.append(Availability(name, False, str(error)))
    return tuple(found)


def open_runner(bundle: Bundle | Path | str, engine: str = "auto", **options: Any) -> Runner:
    """Open `bundle` with `engine`, or with the best that this machine can run.

    A path is read and checked first, see `read_bundle`; options: of OpenOptions. `Runner.why` says which engine it is
    and why, `Runner.passed` why better ones are not. Raises BundleError or EngineError; for "auto" the latter lists
    what every engine lacks.
    """
    check_engine(engine)
    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    chosen = OpenOptions(**options)
    if engine != "auto":
        runner = _open(engine, bundle, chosen)
        runner.why += ": asked for"
        return runner
    passed: list[str] = []
    for name in ENGINES:
        if ENGINES[name].needs_weights and chosen.vision is None:
            continue
        try:
            runner = _open(name, bundle, chosen)
        except EngineError as error:
            passed.append(f"{name}: {error}")
        else:
            runner.why += ": the best that this machine can run"
            runner.passed = tuple(passed)
            return runner
    raise EngineError(f"this machine cannot run the bundle {bundle.path}: {'; '.join(passed)}")


def check_engine(name: str) -> None:
    """Raise EngineError when there is no such engine."""
    if name != "auto" and name not in ENGINES:
        raise EngineError(f"there is no engine {name!r}, it must be one of auto, {', '.join(ENGINES)}")


def open_pipeline(
    bundle: Bundle | Path | str,
    *,
    checkpoint: Path | str | None = None,
    engine: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    frame_budgets: str = "bundle",
    compile: bool = False,
    device_map: str | Path | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    **options: Any,
) -> VideoPipeline:
    """A bundle's engine with the language model of its checkpoint: answers questions about videos.

    checkpoint: directory or hub id of the weights, if they are not where the bundle says; engine: see `open_runner`,
    "torch" for the checkpoint's own tower, in the bundle's dtype; device: of the language model, and of that tower:
    "cpu", "cuda", "cuda:1", by default the first GPU where there is one; dtype: of the language model, fp32, fp16 or
    bf16, by default bf16 on a GPU and fp32 on a CPU; attention: of the language model, as transformers names it, by
    default the best there is; frame_budgets: the "bundle"'s, or with engine "torch" those of the "data", as published;
    compile: decode with torch.compile and a static cache, on a card with CUDA graphs: the same tokens, sooner, after a
    first answer that takes longer; device_map, offload_folder: spread the language model over cards, memory and disk,
    see `earlytom.load`, and `device` is then that of engine torch's tower; options: of OpenOptions, for the engine.
    Close the pipeline, or use it as a context manager.

    The engine is opened before the language model is read: what cannot run is refused in a second. Raises BundleError,
    CheckpointError (other weights than the bundle's among it), ConfigError, EngineError.
    """
    from earlytom.checkpoint import load  # here alone: a machine that only runs engines may lack what these need
    from earlytom.pipeline import VideoPipeline

    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    manifest, config = bundle.manifest, bundle.manifest.config
    if manifest.batch != 1:
        raise ConfigError(
            f"the bundle {bundle.path} takes {manifest.batch} videos a call, a pipeline needs one that takes 1: export "
            "it with --batch 1"
        )
    check_engine(engine)
    if frame_budgets not in FRAME_BUDGETS or (frame_budgets == "data" and engine != "torch"):
        raise ConfigError(
            f"frame_budgets is {frame_budgets!r} with engine {engine}: an engine has the bundle's, and frame counts "
            "that follow the data need engine torch"
        )
    where = computes = torch_device(device)
    if device_map is not None:
        from earlytom.checkpoint.dispatch import Spreading

        if compile:
            raise ConfigError("compiled decoding does not go with a device map: one graph moves no weights or inputs")
        spreading = Spreading.of(device_map, offload_folder)
        device_map, computes = spreading.places or "auto", spreading.main
    kind = torch_dtype(dtype or default_dtype(computes))
    name = str(checkpoint or manifest.checkpoint["name"])
    reading: dict[str, Any] = {"device": where, "pooling": config.pooling, "check": bundle.check_weights}
    if engine != "auto" and ENGINES[engine].needs_weights:
        vision = load(name, parts=("vision",), dtype=torch_dtype(manifest.dtype), **reading).vision
        assert vision is not None  # it was asked for
        options["vision"] = vision
    adaptive = frame_budgets == "data"
    encoder: Any = AdaptiveTower(options["vision"], config) if adaptive else open_runner(bundle, engine, **options)
    try:
        reading |= {"device_map": device_map, "offload_folder": offload_folder}
        model = load(name, parts=("language",), dtype=kind, attn_implementation=attention, **reading)
        return VideoPipeline(encoder, model, config, compile=compile)
    except BaseException:
        if not adaptive:
            encoder.close()
        raise


def torch_device(name: str | None) -> torch.device:
    """Where PyTorch's part runs. Raises ConfigError for a device that is none, or not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"there is no device {name!r}: it must be cpu, cuda, or one card of several, cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"the device {name} is not here: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def default_dtype(device: torch.device) -> str:
    """The dtype of a language model on `device` unless another is asked for."""
    return "fp32" if device.type == "cpu" else "bf16"


def _open(name: str, bundle: Bundle, options: OpenOptions) -> Runner:
    if name in PRODUCTS and not any(record.product == name for record in bundle.manifest.engines):
        raise EngineError(
            f"the bundle {bundle.path} holds no {name} engine; {build_command(bundle.path, name)} adds one"
        )
    module = _load(name)
    try:
        runner: Runner = module.open_bundle(name, bundle, options)
    except EarlyTomError:
        raise
    except Exception as error:  # an engine's own errors have no common base; the cause stays visible in a debugger
        raise EngineError(f"{name} could not open {bundle.path}: {first_line(error)}") from error
    return runner


def _load(name: str) -> ModuleType:
    """The module of an engine. Raises EngineError when its package is not there, or cannot be imported."""
    engine = ENGINES[name]
    if importlib.util.find_spec(engine.module) is None:
        raise EngineError(f"the engine {name} needs the package {engine.module}, which is not here: {engine.install}")
    try:
        return importlib.import_module(HOMES[name])
    except ImportError as error:
        if error.name == HOMES[name]:
            raise EngineError(f"this version of earlytom-export does not run {name} engines yet") from None
        raise EngineError(f"the package {engine.module} cannot be imported: {first_line(error)}") from error
