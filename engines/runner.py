"""What every engine looks like from outside: frames in, the tower's outputs out.

Importing this loads no engine. An engine's module is imported when the engine is asked for, and provides

    probe(name) -> str                          what runs it here, for people; EngineError when this machine cannot
    open_bundle(name, bundle, options) -> Runner        EngineError when this machine cannot run this bundle with it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earlytom.errors import InputError
from earlytom.tower import TowerOutputs
from earlytom.vision.siglip import Vision

from .bundle.manifest import TensorSpec

Frames = Tensor | NDArray[np.uint8]


class Runner(Protocol):
    """An engine, opened. Use it as a context manager, or `close` it.

    name: of the engine; device: where its outputs lie and frames need not be moved; why: on what it runs and how it
    came to be chosen, for people; passed: the better engines that cannot run here, each with the reason; thread_safe:
    whether several threads may be in `run` at once.
    """

    name: str
    device: torch.device
    why: str
    passed: tuple[str, ...]
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
    """`with` for a runner that has `close`; nothing was passed over for it unless `open_runner` says so."""

    passed: tuple[str, ...] = ()

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

    def __post_init__(self) -> None:
        if self.providers is not None:
            object.__setattr__(self, "providers", tuple(self.providers) or None)
