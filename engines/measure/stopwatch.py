"""Where the time of one run goes: named spans, end to end, and hooks that mark their ends inside a model.

Nothing here is in a model's own code: hooks are put on for one run and taken off after it, so that a model that is not
measured pays nothing. On a card a mark is a CUDA event in the current stream, and no span waits for the card.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

BEFORE, AFTER = "before", "after"
SPLICE, PREFILL, FIRST_TOKEN, GENERATION = "splice", "prefill", "first token", "generation"


class Stopwatch:
    """`start`, then `mark(name)` at the end of each span; a name that is marked several times is a sum.

    device: a card whose current stream is measured with events, or a CPU, whose clock is read.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin the first span, on a card that is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._marks = [("", self._now())]

    def mark(self, name: str) -> None:
        """End the span that began at the mark before, and begin the next."""
        self._marks.append((name, self._now()))

    @property
    def last(self) -> str:
        """The name of the span that ended last, "" when none has."""
        return self._marks[-1][0] if self._marks else ""

    def milliseconds(self) -> dict[str, float]:
        """Span -> its time, in the order of the first marks. Waits for the card."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:]):
            took = begin.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - begin)
            found[name] = found.get(name, 0.0) + float(took)
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@dataclass(frozen=True)
class Seam:
    """Where a span ends: before or after a module is called, or after its method `method` is."""

    module: nn.Module
    when: str
    span: str
    method: str | None = None


@contextmanager
def marking(watch: Stopwatch, seams: Sequence[Seam]) -> Iterator[None]:
    """Within the block, each seam marks its span when it is passed for the first time; nothing stays on the modules."""
    with ExitStack() as stack:
        for seam in seams:
            once = _once(watch, seam.span)
            if seam.method is not None:
                stack.enter_context(_after_method(seam.module, seam.method, once))
            elif seam.when == BEFORE:
                stack.callback(seam.module.register_forward_pre_hook(once).remove)
            else:
                stack.callback(seam.module.register_forward_hook(once).remove)
        yield


def tower_seams(layers: Sequence[nn.Module], merge_layers: Sequence[int], *, merges: bool = True) -> tuple[Seam, ...]:
    """The stages of an encoder: patches, the layers up to each merge layer, and the merging after it.

    merges: whether frames are merged between layers. What follows the last layer is the caller's to mark.
    """
    seams = [Seam(layers[0], BEFORE, "vision: patches")]
    first = 0
    for layer in merge_layers:
        seams.append(Seam(layers[layer], AFTER, layers_span(first, layer)))
        if merges and layer + 1 < len(layers):
            seams.append(Seam(layers[layer + 1], BEFORE, merge_span(layer)))
        first = layer + 1
    if first < len(layers):
        seams.append(Seam(layers[-1], AFTER, layers_span(first, len(layers) - 1)))
    return tuple(seams)


def layers_span(first: int, last: int) -> str:
    return f"vision: layers {first}-{last}"


def merge_span(layer: int) -> str:
    return f"vision: merge {layer}"


class FirstToken(BaseStreamer):
    """Marks the first token when generate hands it out; a prompt that is announced before the prefill is none."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def put(self, value: Tensor) -> None:
        if self.watch.last == PREFILL:
            self.watch.mark(FIRST_TOKEN)

    def end(self) -> None:
        pass


def _once(watch: Stopwatch, span: str) -> Any:
    passed: list[bool] = []

    def mark(*_: Any) -> None:
        if not passed:
            passed.append(True)
            watch.mark(span)

    return mark


@contextmanager
def _after_method(module: nn.Module, name: str, mark: Any) -> Iterator[None]:
    method = getattr(module, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        made = method(*args, **kwargs)
        mark()
        return made

    setattr(module, name, marked)  # on the instance, before the class
    try:
        yield
    finally:
        delattr(module, name)
