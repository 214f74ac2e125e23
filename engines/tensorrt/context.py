"""One execution context of a TensorRT engine, its buffers and its CUDA graph; and a bounded pool of them.

A context may be used by one thread at a time, an engine by many contexts at once. Everything is ordered by the caller's
stream: a context that went back to the pool while the card still works on it is waited for on the card, not here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, cuda

from earlytom.errors import EngineError, first_line

from ..bundle.manifest import TensorSpec

ALIGNMENT = 256  # of addresses that TensorRT takes; torch's own allocations are aligned to 512


class ExecutionSlot:
    """`context` with one buffer for each tensor, addresses bound once.

    graph: "torch" captures one call into a CUDA graph and replays it from then on; "library" leaves that to TensorRT
    for RTX, which wants addresses that stay; "none" enqueues, reading the caller's frames where they lie. A graph that
    cannot be captured is done without, `note` says why. `last_error`: the library's last words, for an exception;
    `keep`: what the context needs as long as it lives, which the bindings do not see to; let go of from the last on.
    """

    def __init__(
        self, context: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], device: torch.device, *,
        graph: str = "torch", last_error: Callable[[], str] = lambda: "it does not say why", keep: tuple[Any, ...] = (),
    ) -> None:
        self.context, self.device, self.note = context, device, ""
        self._keep = keep  # after the context, so that it outlives it where nobody calls `close` as well
        self._input, self._outputs, self._last_error = inputs[0].name, tuple(spec.name for spec in outputs), last_error
        self._addresses: dict[str, int] = {}
        self._keep_addresses = graph != "none"
        self._own = cuda.Stream(device)  # where the caller is on the default stream, on which TensorRT synchronises
        self._done = cuda.Event()
        self._graph: Any = None
        # Outside of inference mode, in which the caller may be: the buffers, and what torch makes for its first graph,
        # are written to outside of it as well.
        with torch.inference_mode(False):
            self._buffers = {
                spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
                for spec in (*inputs, *outputs)
            }
            for name, buffer in self._buffers.items():
                self._bind(name, buffer)
            self._warm_up()
            if graph == "torch":
                self._capture()

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run(self, frames: Tensor) -> dict[str, Tensor]:
        """Enqueue one call on the caller's current stream: tensors of the caller's own, ready in stream order."""
        stream = cuda.current_stream(self.device)
        stream.wait_event(self._done)
        static = self._buffers[self._input]
        there = frames.device == self.device and frames.is_contiguous() and frames.data_ptr() % ALIGNMENT == 0
        try:
            if self._keep_addresses or not there:
                # A copy from the host is waited for: the caller may write to its frames again.
                static.copy_(frames, non_blocking=frames.is_cuda)
                frames = static
            if self._graph is not None:
                self._graph.replay()
            else:
                self._bind(self._input, frames)
                self._enqueue(stream)
            return {name: self._buffers[name].clone() for name in self._outputs}
        finally:  # when there is no memory for the clones, the card works on this context all the same
            self._done.record(stream)

    def close(self) -> None:
        """Wait for the card, then let go of everything."""
        with cuda.device(self.device):
            self._done.synchronize()
            self._graph = None
            self.context = None
            self._keep = ()
            self._buffers.clear()

    def _bind(self, name: str, tensor: Tensor) -> None:
        """Tell an address, once: a library that captures graphs by itself may take any telling for a change."""
        address = tensor.data_ptr()
        if self._addresses.get(name) == address:
            return
        if not self.context.set_tensor_address(name, address):
            raise EngineError(f"the engine does not take the address of {name}: {self._last_error()}")
        self._addresses[name] = address

    def _enqueue(self, stream: Any) -> None:
        own = self._own if stream.cuda_stream == 0 else stream
        if own is not stream:
            own.wait_stream(stream)
        if not self.context.execute_async_v3(own.cuda_stream):
            raise EngineError(f"the engine failed: {self._last_error()}")
        if own is not stream:
            stream.wait_stream(own)

    def _warm_up(self) -> None:
        """One call on zeros: what is compiled, loaded or allocated at first use is, and capturing may not do it."""
        self._own.wait_stream(cuda.current_stream(self.device))  # the buffers were filled there
        self._enqueue(self._own)
        self._done.record(self._own)
        self._own.synchronize()

    def _capture(self) -> None:
        graph = cuda.CUDAGraph()
        try:
            # Other threads may go on allocating and launching meanwhile. The outer context is for a capture that fails:
            # not every torch then leaves the stream that it captured on.
            here = cuda.stream(cuda.current_stream(self.device))
            with here, cuda.graph(graph, stream=self._own, capture_error_mode="thread_local"):
                self._enqueue(self._own)
        except Exception as error:  # torch's error types for CUDA differ between versions
            self.note = f"without CUDA graph, which could not be captured ({first_line(error)})"
            return
        self._graph = graph


class SlotPool:
    """At most `limit` slots, made by `make` when all others are in use; who comes then waits.

    The first one is made at once, so that what cannot work fails here. When the card has no room for a further one, the
    pool stays as it is.
    """

    def __init__(self, make: Callable[[], ExecutionSlot], limit: int) -> None:
        if limit < 1:
            raise EngineError(f"contexts is {limit}, it must be at least 1")
        self._make, self._limit = make, limit
        self._condition = threading.Condition()
        self._building = threading.Lock()  # one at a time: a capture is easily disturbed
        self._closed = False
        first = make()
        self.slots: list[ExecutionSlot] = [first]
        self._free = [first]
        self._made = 1

    @contextmanager
    def take(self) -> Iterator[ExecutionSlot]:
        """A slot for this thread alone. Raises EngineError when the pool is closed."""
        slot = self._acquire()
        try:
            yield slot
        finally:
            with self._condition:
                if self._closed:
                    slot.close()
                else:
                    self._free.append(slot)
                self._condition.notify()

    def _acquire(self) -> ExecutionSlot:
        while True:
            with self._condition:
                while not self._closed and not self._free and self._made >= self._limit:
                    self._condition.wait()
                if self._closed:
                    raise EngineError("the engine was closed: open it again")
                if self._free:
                    return self._free.pop()
                self._made += 1
            try:
                with self._building:
                    slot = self._make()
            except BaseException as error:
                with self._condition:
                    self._made -= 1
                    self._condition.notify()
                    if isinstance(error, Exception):
                        self._limit = self._made  # at least the first one, which will come back
                        continue
                raise
            with self._condition:
                self.slots.append(slot)
            return slot

    def close(self) -> None:
        """Free the slots; those in use are freed when they come back."""
        with self._condition:
            self._closed = True
            free, self._free = self._free, []
            self.slots = []
            self._condition.notify_all()
        for slot in free:
            slot.close()
