"""The choice of an engine: the one asked for, or the best that this machine can run."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from earlytom.errors import EarlyTomError, EngineError
from earlytom.vision.siglip import Vision

from .bundle.reader import Bundle, read_bundle
from .products import ENGINES, PRODUCTS, build_command
from .runner import OpenOptions, Runner, first_line


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


def open_runner(
    bundle: Bundle | Path | str, engine: str = "auto", *, device: str | None = None, threads: int | None = None,
    providers: tuple[str, ...] | None = None, vision: Vision | None = None, cuda_graph: bool = True, contexts: int = 2,
) -> Runner:
    """Open `bundle` with `engine`, or with the best that this machine can run; `Runner.why` says which and why.

    A path is read and checked first, see `read_bundle`; the other options are those of OpenOptions. Raises BundleError
    or EngineError; for "auto" the latter lists what every engine lacks.
    """
    if engine != "auto" and engine not in ENGINES:
        raise EngineError(f"there is no engine {engine!r}, it must be one of auto, {', '.join(ENGINES)}")
    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    options = OpenOptions(device, threads, tuple(providers) if providers else None, vision, cuda_graph, contexts)
    if engine != "auto":
        runner = _open(engine, bundle, options)
        runner.why = f"{runner.why}: asked for"
        return runner
    passed: list[str] = []
    for name in ENGINES:
        if ENGINES[name].needs_weights and vision is None:
            continue
        try:
            runner = _open(name, bundle, options)
        except EngineError as error:
            passed.append(f"{name}: {error}")
        else:
            runner.why = f"{runner.why}: the best that this machine can run" + "".join(f"; not {p}" for p in passed)
            return runner
    raise EngineError(f"this machine cannot run the bundle {bundle.path}: {'; '.join(passed)}")


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
    home = f"engines.{engine.runs_in}"
    if importlib.util.find_spec(engine.module) is None:
        raise EngineError(f"the engine {name} needs the package {engine.module}, which is not here: {engine.install}")
    try:
        return importlib.import_module(home)
    except ImportError as error:
        if error.name == home:
            raise EngineError(f"this version of earlytom-export does not run {name} engines yet") from None
        raise EngineError(f"the package {engine.module} cannot be imported: {first_line(error)}") from error
