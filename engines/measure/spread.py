"""What several measurements of one thing come to: median, least, most. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `runs` rounds."""

    median: float
    minimum: float
    maximum: float
    runs: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        return cls(statistics.median(milliseconds), min(milliseconds), max(milliseconds), len(milliseconds))

    def to_dict(self) -> dict[str, Any]:
        return {f"{k}_ms" if k != "runs" else k: round(v, 4) for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.minimum:.2f}-{self.maximum:.2f}, {self.runs} runs)"


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median over rounds of how many times as much `slower` is."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
