"""Times of several calls, measured together so that a warming card or a busy machine favours none of them.

Each round runs every call once, in an order that alternates, between two CUDA events (on a CPU, two readings of the
clock); medians are taken over rounds, and ratios round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .spread import Timing, ratio

T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """Calls timed together: name -> milliseconds of each round."""

    rounds: Mapping[str, list[float]]

    def timing(self, name: str) -> Timing:
        return Timing.of(self.rounds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """Median over rounds of how many times as long `slower` takes."""
        return ratio(self.rounds[slower], self.rounds[faster])

    def to_dict(self) -> dict[str, Any]:
        return {name: self.timing(name).to_dict() for name in self.rounds}


def compare_times(
    calls: Mapping[str, Callable[[], object]], *, runs: int = 20, warm_up: int = 3, seconds: float | None = None,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Time `calls` against each other: `warm_up` rounds, then `runs`, fewer (at least one) when `seconds` are over.

    A call that works on a card must do so on its current stream.
    """
    device = torch.device(device)
    rounds = interleaved(
        list(calls), lambda name, _: _time(calls[name], device), runs=runs, warm_up=warm_up, seconds=seconds
    )
    return Comparison(rounds)


def interleaved(
    names: Sequence[str], call: Callable[[str, int], T], *, runs: int, warm_up: int, seconds: float | None = None
) -> dict[str, list[T]]:
    """What `call(name, round)` gives in each round, name by name in an order that alternates; warm-up left out.

    When `seconds` are over, the round that is under way is the last, and counts.
    """
    end = None if seconds is None else time.perf_counter() + seconds
    rounds: dict[str, list[T]] = {name: [] for name in names}
    for index in range(warm_up + runs):
        order = list(names)[:: 1 if index % 2 else -1]
        found = {name: call(name, index) for name in order}
        over = end is not None and time.perf_counter() > end
        if index >= warm_up or over:
            for name, made in found.items():
                rounds[name].append(made)
        if over:
            break
    return rounds


def _time(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        begin, finish = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        finish.record()
        finish.synchronize()
        return float(begin.elapsed_time(finish))


def matrix_rate(device: torch.device | str, dtype: torch.dtype, *, size: int = 8192, runs: int = 10) -> float:
    """FLOPs a second of one large product of random matrices: what the card can reach, by its own library."""
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = compare_times({"product": lambda: torch.mm(a, b, out=out)}, runs=runs, device=device).timing("product")
    return 2 * size**3 / (timing.median / 1000)
