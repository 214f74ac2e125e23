"""Names of what a tower computes on the way to its tokens: in a trace, in a graph, in a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

OF_A_STAGE = ("similarity", "weights", "hidden")  # the fields of tower.Stage
OUTPUTS = ("weights", "tokens", "newlines")  # compared under these names; no intermediates


class Intermediate(NamedTuple):
    """kind: "similarity", "weights", "hidden" or "received"; layer: the merge layer, None after the last one."""

    kind: str
    layer: int | None = None

    def to_text(self) -> str:
        """`similarity_8`, `weights_8`, `hidden_8`, `similarity_final`, `received`."""
        if self.layer is None:
            return "similarity_final" if self.kind == "similarity" else self.kind
        return f"{self.kind}_{self.layer}"

    @classmethod
    def from_text(cls, text: str) -> Intermediate:
        kind, _, layer = text.partition("_")
        return cls(kind, int(layer) if layer.isdigit() else None)


def intermediates(merge_layers: Sequence[int]) -> tuple[Intermediate, ...]:
    """All of a tower with these merge layers, in the order of computation; none of an unpruned one."""
    stages = tuple(Intermediate(kind, layer) for layer in merge_layers for kind in OF_A_STAGE)
    return (*stages, Intermediate("similarity"), Intermediate("received")) if stages else ()


def computed_at(name: str) -> tuple[float, int, int]:
    """Sorts names, those of outputs too, by when they are computed. Raises ValueError for a name that is none."""
    if name in OUTPUTS:
        return math.inf, 1, OUTPUTS.index(name)
    kind, layer = Intermediate.from_text(name)
    return math.inf if layer is None else layer, 0, (*OF_A_STAGE, "received").index(kind)
