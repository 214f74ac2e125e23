"""What verifying a bundle found, as Python objects and as the plain JSON that a manifest keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .numbers import Hop


@dataclass(frozen=True)
class HopReport:
    """One hop of the ladder: what was compared, its numbers and the verdict.

    status: "passed", "failed" or "not run"; reasons: why it is not "passed"; numbers: None when it did not run;
    polygraphy: its comparator's metrics of each output; note: what to know when reading the numbers; repeat: the
    command that runs the hop by hand, in the bundle's directory, on the saved tensors.
    """

    reference: str
    actual: str
    dtype: str
    status: str
    reasons: tuple[str, ...] = ()
    bisect: str | None = None
    numbers: Hop | None = None
    polygraphy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""
    repeat: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.reference} → {self.actual}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as a manifest keeps it: without the time, so that the same export is the same manifest."""
        names = ("name", "reference", "actual", "dtype", "status", "bisect", "note", "repeat")
        out: dict[str, Any] = {name: getattr(self, name) for name in names}
        out["reasons"] = list(self.reasons)
        if self.numbers is not None:
            out["differences"] = {name: d.to_dict() for name, d in self.numbers.differences.items()}
            out["plan"] = self.numbers.plan.to_dict()
            out["polygraphy"] = {name: dict(metrics) for name, metrics in self.polygraphy.items()}
        return out


@dataclass(frozen=True)
class ParityReport:
    """All hops of one bundle on one clip."""

    hops: tuple[HopReport, ...]

    @property
    def passed(self) -> bool:
        """Whether hops ran and none failed; a hop that could not run is no failure, see `complete`."""
        states = {hop.status for hop in self.hops}
        return "passed" in states and "failed" not in states

    @property
    def complete(self) -> bool:
        """Whether every hop ran."""
        return all(hop.status != "not run" for hop in self.hops)

    @property
    def reason(self) -> str:
        """Why it did not pass, one sentence; empty when it did."""
        wrong = [hop for hop in self.hops if hop.status == "failed"] or list(self.hops)
        return "" if self.passed else f"{wrong[0].name} {wrong[0].status}: {wrong[0].reasons[0]}"

    def to_dicts(self) -> tuple[dict[str, Any], ...]:
        """Plain JSON, one object for each hop: a manifest's `parity`."""
        return tuple(hop.to_dict() for hop in self.hops)
