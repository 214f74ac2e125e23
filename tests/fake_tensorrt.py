"""A TensorRT without a card: the classes and methods that the runner uses, with the real bindings' parameters.

The "engine" is JSON. A call computes tokens = mean of the frames + arange, in the memory at the addresses it was given.
`engines/tensorrt/test_runner.py` holds every signature against the installed bindings. What the real library refuses,
or may crash on, is refused here: see NOT_REFITTABLE, and the assertions.
"""

from __future__ import annotations

import ctypes
import json
import math
import threading
import time
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum, IntFlag
from typing import Any

import numpy as np
import torch

from engines.bundle.manifest import TensorSpec

NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "bool": "BOOL", "uint8": "UINT8"}
DataType = Enum("DataType", list(NAMES.values()))  # type: ignore[misc]
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])  # type: ignore[misc]
EngineValidity = IntEnum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"], start=0)  # type: ignore[misc]
CudaGraphStrategy = IntEnum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"], start=0)  # type: ignore[misc]


class EngineInvalidityDiagnostics(IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


# The words of TensorRT and of pybind11, github.com/NVIDIA/TensorRT/issues/2783 and 1468.
NOT_REFITTABLE = "[refit.cpp::createInferRefitter_INTERNAL::1209] Error Code 3: ... condition: e.isRefittable()"
NULL_POINTER = "pybind11::init(): factory function returned nullptr"


def plan(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], **more: Any) -> bytes:
    """The bytes of an engine."""
    tensors = [[s.name, s.dtype, list(s.shape), s in inputs] for s in (*inputs, *outputs)]
    return json.dumps({"tensors": tensors, **more}).encode()


class ILogger:
    WARNING, ERROR = 2, 1

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class IRuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        on_card()
        if not bytes(blob).startswith(b"kernels"):
            return False
        self.content = bytes(blob)
        return True

    def reset(self) -> bool:
        self.content = b""
        return True

    def serialize(self) -> bytes:
        return self.content


class IRuntimeConfig:
    """Keeps neither its engine nor its cache alive, and nothing that is made with it keeps it: so do the bindings."""

    cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def __init__(self, engine: ICudaEngine) -> None:
        self.needs = {"engine": weakref.ref(engine)}
        weakref.finalize(self, outlived, state.faults, "a runtime configuration", self.needs)

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.needs["cache"] = weakref.ref(cache)
        return True


def outlived(faults: list[str], what: str, needs: dict[str, weakref.ref[Any]]) -> None:
    faults += [f"{what} outlived its {name}" for name, alive in needs.items() if alive() is None]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.told = 0
        self.busy = threading.Lock()
        self.needs: dict[str, weakref.ref[Any]] = {}
        if config is not None:
            self.needs = {"configuration": weakref.ref(config), **config.needs}
            if "cache" in config.needs:
                cache = config.needs["cache"]()
                cache.content = cache.content or b"kernels of this card"
        weakref.finalize(self, outlived, state.faults, "a context", self.needs)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert type(name) is str and type(memory) is int and memory % 16 == 0
        self.addresses[name] = memory
        self.told += 1
        return name in self.engine.tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert type(stream_handle) is int
        assert stream_handle != 0, "TensorRT synchronises on the default stream"
        on_card()
        assert all(alive() is not None for alive in self.needs.values()), "what the context needs is gone"
        state = self.engine.state
        if state.fail:
            return False
        addresses = dict(self.addresses)
        assert set(addresses) == set(self.engine.tensors)
        if state.capturing is not None:
            if state.refuse_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            state.capturing.append(lambda: self.compute(addresses))
        else:
            state.enqueued += 1
            self.compute(addresses)
        return True

    def compute(self, addresses: dict[str, int]) -> None:
        assert self.busy.acquire(blocking=False), "two threads in one context"
        try:
            with self.engine.state.counting():
                time.sleep(self.engine.state.delay)
                arrays = {n: array_at(addresses[n], *spec[:2]) for n, spec in self.engine.tensors.items()}
                mean = float(arrays["frames"].mean())
                arrays["tokens"][:] = np.arange(arrays["tokens"].size).reshape(arrays["tokens"].shape) + mean
        finally:
            self.busy.release()


def array_at(address: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    kind = np.dtype(dtype)
    buffer = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(address)
    return np.frombuffer(buffer, kind).reshape(shape)


class ICudaEngine:
    device_memory_size_v2 = 1000

    def __init__(self, content: dict[str, Any], state: State) -> None:
        self.tensors = {name: (dtype, tuple(shape), taken) for name, dtype, shape, taken in content["tensors"]}
        self.state, self.stripped = state, content.get("stripped", False)
        self.refittable = self.stripped  # built with REFIT_IDENTICAL, which the others are not
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[NAMES[self.tensors[name][0]]]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode["INPUT" if self.tensors[name][2] else "OUTPUT"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self)

    def create_execution_context(self, runtime_config: IRuntimeConfig | None = None) -> IExecutionContext | None:
        on_card()
        assert not self.stripped, "an engine without its weights"
        if self.state.contexts >= self.state.room:
            return None
        self.state.contexts += 1
        self.state.strategies.append(None if runtime_config is None else runtime_config.cuda_graph_strategy.name)
        return IExecutionContext(self, runtime_config)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger, self.engine_host_code_allowed = logger, False

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        return state.validity

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        on_card()
        state.deserialised.append(bytes(serialized_engine))
        try:
            content = json.loads(bytes(serialized_engine))
        except ValueError:
            self.logger.log(ILogger.ERROR, "Error Code 1:\n magic tag does not match")
            return None
        if content.get("host_code") and not self.engine_host_code_allowed:
            self.logger.log(ILogger.ERROR, "host code is not allowed")
            return None
        return ICudaEngine(content, state)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        if not engine.refittable:
            logger.log(ILogger.ERROR, NOT_REFITTABLE)
            raise TypeError(NULL_POINTER)
        self.engine, self.given = engine, False

    def get_missing_weights(self) -> list[str]:
        return [] if self.given or not self.engine.stripped else ["vision.layers.0.fc1.weight"]

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return False
        self.engine.stripped = False
        return True


class OnnxParserRefitter:
    num_errors = 0

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        state.refitted.append(model)
        self.refitter.given = True
        return True


class State:
    """What happened, and what is to go wrong."""

    def __init__(self) -> None:
        self.deserialised: list[bytes] = []
        self.refitted: list[str] = []
        self.strategies: list[str | None] = []
        self.faults: list[str] = []
        self.here = threading.local()  # the device and the stream that are current in a thread
        self.capturing: list[Any] | None = None
        self.refuse_capture = self.fail = False
        self.enqueued = self.replayed = self.contexts = self.running = self.most = 0
        self.room, self.delay = 100, 0.0
        self.validity: tuple[Any, int] = (EngineValidity.VALID, 0)
        self.lock = threading.Lock()

    @contextmanager
    def counting(self) -> Iterator[None]:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        yield
        with self.lock:
            self.running -= 1


state = State()


def on_card() -> None:
    """What works on a card must do so on the engine's: with cuda:1 another one is current unless it is chosen."""
    assert getattr(state.here, "devices", 0) > 0, "the engine's device was not made the current one"


class Stream:
    handles = iter(range(1, 1 << 30))

    def __init__(self, device: Any = None, handle: int | None = None) -> None:
        self.cuda_stream = next(self.handles) if handle is None else handle

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def synchronize(self) -> None: ...


class Event:
    def record(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None: ...


class CUDAGraph:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        on_card()
        with state.lock:
            state.replayed += 1
        assert self.calls
        for call in self.calls:
            call()


def cuda() -> types.SimpleNamespace:
    """What stands in for torch.cuda."""
    default = Stream(handle=0)

    def current_stream(device: Any = None) -> Stream:
        found: Stream = getattr(state.here, "stream", default)
        return found

    @contextmanager
    def stream(wanted: Stream) -> Iterator[None]:
        before, state.here.stream = current_stream(), wanted
        try:
            yield
        finally:
            state.here.stream = before

    @contextmanager
    def graph(graph: CUDAGraph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert stream.cuda_stream != 0 and capture_error_mode == "thread_local"
        assert not torch.is_inference_mode_enabled(), "torch's first graph makes tensors that stay"
        before, state.here.stream, state.capturing = current_stream(), stream, graph.calls
        try:
            yield
            state.here.stream = before  # not where it failed: so did torch before 2.15
        finally:
            state.capturing = None

    @contextmanager
    def device(device: Any) -> Iterator[None]:
        state.here.devices = getattr(state.here, "devices", 0) + 1
        try:
            yield
        finally:
            state.here.devices -= 1

    return types.SimpleNamespace(
        Stream=Stream, Event=Event, CUDAGraph=CUDAGraph, graph=graph, device=device, stream=stream,
        current_stream=current_stream, current_device=lambda: 0, is_available=lambda: True,
    )


def module(product: str, version: str) -> types.ModuleType:
    """`tensorrt` or `tensorrt_rtx`; forgets what happened before."""
    global state
    state = State()
    made = types.ModuleType(product)
    public: dict[str, Any] = {
        "__version__": version, "ILogger": ILogger, "Runtime": Runtime, "TensorIOMode": TensorIOMode,
        "DataType": DataType, "Refitter": Refitter, "OnnxParserRefitter": OnnxParserRefitter,
    }
    if product == "tensorrt_rtx":
        public |= {"CudaGraphStrategy": CudaGraphStrategy, "EngineValidity": EngineValidity,
                   "EngineInvalidityDiagnostics": EngineInvalidityDiagnostics}
    else:
        public["Runtime"] = type("Runtime", (_NoValidity,), {})
    made.__dict__.update(public)
    return made


class _NoValidity:
    """TensorRT's own runtime cannot be asked about an engine."""

    def __init__(self, logger: ILogger) -> None:
        self.logger, self.engine_host_code_allowed = logger, False

    deserialize_cuda_engine = Runtime.deserialize_cuda_engine
