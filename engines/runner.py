"""What every engine looks like from outside, and the choice of one: frames in, the tower's outputs out.

Importing this loads no engine. An engine's module is imported when the engine is asked for, and provides

    probe(name) -> str                          what runs it here, for people; EngineError when this machine cannot
    open_bundle(name, bundle, options) -> Runner        EngineError when this machine cannot run this bundle with it
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earlytom.bundle import PRODUCTS, Bundle, TensorSpec, read_bundle
from earlytom.config import EarlyTomConfig
from earlytom.errors import EarlyTomError, EngineError, InputError
from earlytom.siglip import Vision
from earlytom.tower import StaticTower, TowerOutputs

Frames = Tensor | NDArray[np.uint8]


class Runner(Protocol):
    """An engine, opened. Use it as a context manager, or `close` it.

    name: of the engine; why: how it came to be chosen, for people; thread_safe: whether several threads may be in
    `run` at once.
    """

    name: str
    why: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    thread_safe: bool

    def run(self, frames: Frames) -> TowerOutputs:
        """Frames uint8 [V, T, H, W, 3] -> TowerOutputs, tensors that belong to the caller. Raises InputError."""

    def close(self) -> None:
        """Free what the engine holds; a second call does nothing, `run` after it raises EngineError."""

    def __enter__(self) -> Runner: ...

    def __exit__(self, *error: object) -> None: ...


class Closing:
    """`with` for a runner that has `close`."""

    def __enter__(self) -> Runner:
        return self  # type: ignore[return-value]  # the class that inherits this is the Runner

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


def dtype_name(value: Tensor | NDArray[np.generic]) -> str:
    """The dtype as a TensorSpec has it: "uint8", "bfloat16"."""
    return str(value.dtype).removeprefix("torch.")


def check_inputs(specs: tuple[TensorSpec, ...], feeds: Mapping[str, Tensor | NDArray[np.generic]]) -> None:
    """Raise InputError unless `feeds` are exactly `specs`: names, dtypes, shapes. All mismatches come out at once."""
    wrong = [f"an input {name} that it does not have" for name in feeds if name not in {spec.name for spec in specs}]
    for spec in specs:
        value = feeds.get(spec.name)
        if value is None:
            wrong.append(f"no {spec.name}")
        elif not isinstance(value, (Tensor, np.ndarray)):
            wrong.append(f"{spec.name} as a {type(value).__name__}")
        elif (given := TensorSpec(spec.name, dtype_name(value), tuple(value.shape))) != spec:
            wrong.append(str(given))
    if wrong:
        raise InputError(f"the engine takes {'; '.join(map(str, specs))} and was given {', '.join(wrong)}")


class TorchRunner(Closing):
    """The PyTorch tower as an engine, on the device and in the dtype of `vision`. No state changes: thread-safe."""

    name = "torch"
    thread_safe = True

    def __init__(
        self, vision: Vision, config: EarlyTomConfig, *, batch: int = 1, attention: str = "fused", why: str = ""
    ) -> None:
        self._tower: StaticTower | None = StaticTower(vision, config, batch=batch, attention=attention)
        shapes, dtype = self._tower.shapes, str(vision.dtype).removeprefix("torch.")
        self.inputs = tuple(TensorSpec(name, *spec) for name, spec in shapes.inputs.items())
        self.outputs = tuple(TensorSpec(name, *spec) for name, spec in shapes.outputs(dtype).items())
        self.why = why or f"torch, {dtype} on {vision.image_newline.device}"

    def run(self, frames: Frames) -> TowerOutputs:
        """As Runner.run; the outputs lie on the device of the weights."""
        check_inputs(self.inputs, {"frames": frames})
        if self._tower is None:
            raise EngineError("the torch engine was closed: open it again")
        if isinstance(frames, np.ndarray):
            frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
        with torch.no_grad():
            outputs: TowerOutputs = self._tower(frames.to(self._tower.vision.image_newline.device))
            return outputs

    def close(self) -> None:
        self._tower = None


@dataclass(frozen=True)
class OpenOptions:
    """What a caller may ask of an engine; each takes what concerns it.

    device: "cpu", "cuda" or "cuda:1", None for the best there is; threads: inside one operator, on a CPU; providers:
    ONNX Runtime's, in order of preference; vision: the weights, for the torch engine, moved to `device`; cuda_graph:
    whether TensorRT replays a captured graph; contexts: calls that TensorRT may work on at once.
    """

    device: str | None = None
    threads: int | None = None
    providers: tuple[str, ...] | None = None
    vision: Vision | None = None
    cuda_graph: bool = True
    contexts: int = 2  # each has activations of its own


class _Engine(NamedTuple):
    module: str  # provides probe and open_bundle
    package: str
    install: str


# In the order of preference of "auto". The last one is taken only when the caller has its weights.
ENGINES: dict[str, _Engine] = {
    "tensorrt": _Engine("engines.tensorrt_run", "tensorrt", "pip install tensorrt"),
    "tensorrt-rtx": _Engine("engines.tensorrt_run", "tensorrt_rtx", "pip install tensorrt-rtx"),
    "onnxruntime": _Engine("engines.onnxruntime", "onnxruntime", "pip install onnxruntime"),
    "torch": _Engine("engines.runner", "torch", "pip install torch"),
}


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
        if name == "torch" and vision is None:
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
            f"the bundle {bundle.path} holds no {name} engine; earlytom-export --engine {name} makes one"
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
    if importlib.util.find_spec(engine.package) is None:
        raise EngineError(f"the engine {name} needs the package {engine.package}, which is not here: {engine.install}")
    try:
        return importlib.import_module(engine.module)
    except ImportError as error:
        if error.name == engine.module:
            raise EngineError(f"this version of earlytom-export does not run {name} engines yet") from None
        raise EngineError(f"the package {engine.package} cannot be imported: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def probe(name: str) -> str:
    """See the module's docstring; this and the next function are the torch engine's."""
    return f"torch {torch.__version__}, {'CUDA' if torch.cuda.is_available() else 'CPU'}; needs the checkpoint"


def open_bundle(name: str, bundle: Bundle, options: OpenOptions) -> Runner:
    manifest, vision = bundle.manifest, options.vision
    if vision is None:
        raise EngineError(
            f"the torch engine needs the weights, which a bundle does not hold: give the checkpoint "
            f"{manifest.checkpoint['name']}"
        )
    if vision.geometry != manifest.geometry:
        raise EngineError(
            f"the weights given to the torch engine are not those of the bundle {bundle.path}: their sizes differ, "
            f"{vision.geometry} against {manifest.geometry}"
        )
    if options.device is not None:
        vision = vision.to(options.device)
    return TorchRunner(vision, manifest.config, batch=manifest.batch)
