"""Spans add up, hooks mark once and leave nothing behind, memory is what was needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engines.measure import stopwatch
from engines.measure.memory import Memory
from engines.measure.stopwatch import AFTER, BEFORE, FirstToken, Seam, Stopwatch, marking, tower_seams


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Readings of the clock to come, in seconds."""
    readings: list[float] = []
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: readings.pop(0))
    return readings


def test_spans_lie_end_to_end_and_names_add_up(clock: list[float]) -> None:
    clock += [10.0, 10.5, 11.0, 11.25]
    watch = Stopwatch("cpu")
    watch.start()
    for name in ("a", "b", "a"):
        watch.mark(name)
    assert watch.milliseconds() == {"a": 750.0, "b": 500.0} and watch.last == "a"
    clock += [20.0, 21.0]
    watch.start()
    watch.mark("c")
    assert watch.milliseconds() == {"c": 1000.0}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.halve(self.two(self.one(x)))

    def halve(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_seams_mark_once_in_the_order_of_the_calls() -> None:
    model, watch = Pair(), Stopwatch("cpu")
    seams = (Seam(model.two, BEFORE, "one"), Seam(model.two, AFTER, "two"), Seam(model, AFTER, "halved", "halve"))
    watch.start()
    with marking(watch, seams):
        assert model(torch.ones(1)) == model(torch.ones(1)) == 0.5
    model(torch.ones(1))
    assert list(watch.milliseconds()) == ["one", "two", "halved"]
    with pytest.raises(ValueError, match="stop"), marking(watch, seams):
        raise ValueError("stop")
    assert "halve" not in vars(model) and not model.two._forward_hooks and not model.two._forward_pre_hooks


@pytest.mark.parametrize(
    ("merges", "expected"),
    [
        ((1,), ["patches", "layers 0-1", "merge 1", "layers 2-3"]),
        ((0, 3), ["patches", "layers 0-0", "merge 0", "layers 1-3"]),
        ((), ["patches", "layers 0-3"]),
    ],
)
def test_stages_of_an_encoder(merges: tuple[int, ...], expected: list[str]) -> None:
    layers = [nn.Identity() for _ in range(4)]
    watch = Stopwatch("cpu")
    watch.start()
    with marking(watch, tower_seams(layers, merges)):
        for layer in layers:
            layer(torch.ones(1))
    assert [name.removeprefix("vision: ") for name in watch.milliseconds()] == expected
    assert not [seam for seam in tower_seams(layers, merges, merges=False) if "merge" in seam.span]


def test_only_a_token_after_the_prefill_is_the_first() -> None:
    watch = Stopwatch("cpu")
    watch.start()
    heard: Any = FirstToken(watch)
    heard.put(torch.tensor([[1, 2]]))  # the prompt
    watch.mark("prefill")
    for token in (3, 4):
        heard.put(torch.tensor([token]))
    heard.end()
    assert list(watch.milliseconds()) == ["prefill", "first token"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel tells no high-water mark")
def test_memory_is_what_was_needed_at_most() -> None:
    memory = Memory("cpu")
    memory.start()
    kept = torch.ones(2**21)
    for _ in range(3):
        torch.ones(2**24)  # 64 MiB that do not stay
    growth = memory.growth()
    assert growth is not None and growth + 2**20 >= 72 * 2**20 and growth < 160 * 2**20 and kept.sum() == 2**21


def test_memory_that_cannot_be_told_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.measure.memory._PROCESS", Path("/nowhere"))
    memory = Memory("cpu")
    assert memory.growth() is None
    memory.start()
    assert memory.growth() is None
