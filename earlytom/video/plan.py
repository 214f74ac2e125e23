"""Which packets have to be decoded for the frames that are wanted: a pure function of a timeline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .packets import Timeline


@dataclass(frozen=True)
class Span:
    """Packets first ... last, decoded in one go, and the frames that come out of it.

    Attributes:
        first, last: positions in the file; `first` is an entry.
        shown: int64 [n], the pts of its frames, rising: from the entry's to the last one wanted, without a gap.
        index: position of shown[0] among all frames of the file.
    """

    first: int
    last: int
    shown: NDArray[np.int64]
    index: int

    @property
    def packets(self) -> int:
        return self.last - self.first + 1


def plan_spans(timeline: Timeline, wanted: Iterable[int]) -> list[Span]:
    """The spans for the frames at positions `wanted`, rising, among all frames in the order in which they are shown.

    Each frame is decoded from the last entry that precedes it both in the file and in time, up to the last packet that
    is shown no later than it. Spans that touch are one.
    """
    pts, entries = timeline.pts, timeline.entries
    order = np.argsort(pts)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    needed = np.maximum.accumulate(order)  # to show frames 0 ... i, packets 0 ... needed[i] are needed
    bounds: list[tuple[int, int, int]] = []  # first and last packet, last frame
    for index in wanted:
        at = int(np.searchsorted(entries, order[index], side="right")) - 1
        while pts[entries[at]] > pts[order[index]]:
            at -= 1
        first, last = int(entries[at]), int(needed[index])
        if bounds and first <= bounds[-1][1] + 1:
            first = bounds[-1][0]
            last = max(last, bounds.pop()[1])
        bounds.append((first, last, index))
    return [
        Span(first, last, pts[order[rank[first] : index + 1]], int(rank[first])) for first, last, index in bounds
    ]
