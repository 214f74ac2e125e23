"""Two measurements held against each other, row by row. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from earlytom.demo.table import aligned_table
from earlytom.errors import InputError

from .results import VISION, Results, Row
from .spread import Timing

QUANTITIES = ("ttft", VISION, "prefill", "generation")
NO_MATTER = ("contestants", "runs", "warm_up", "seconds")  # settings whose difference does not change what is measured


@dataclass(frozen=True)
class Change:
    """One quantity of one row in both: medians in ms; clear: whether the two ranges do not meet."""

    row: str
    quantity: str
    before: float
    after: float
    clear: bool

    @property
    def speedup(self) -> float:
        return self.before / self.after if self.after else float("inf")


@dataclass(frozen=True)
class ResultsComparison:
    """Changes in what both hold, and in what else they differ."""

    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "changes": [asdict(change) | {"speedup": round(change.speedup, 4)} for change in self.changes]
        }


def compare(before: Results, after: Results) -> ResultsComparison:
    """Raises InputError when no row is in both."""
    names = [row.name for row in before.rows]
    common = [row for row in after.rows if row.name in names]
    if not common:
        raise InputError(f"the two measurements have no row in common: {', '.join(names)} against "
                         f"{', '.join(row.name for row in after.rows)}")
    changes = []
    for row in common:
        other = before.row(row.name)
        assert other is not None
        changes += [change for name in QUANTITIES if (change := _change(other, row, name)) is not None]
    return ResultsComparison(
        tuple(changes), tuple(_differences(before, after)),
        tuple(name for name in names if after.row(name) is None),
        tuple(row.name for row in after.rows if before.row(row.name) is None),
    )


def comparison_markdown(found: ResultsComparison, names: tuple[str, str]) -> str:
    """A table with a row each, times before and after, and how many times as fast; * where the ranges do not meet."""
    heads = ["", "", names[0], names[1], "times as fast"]
    rows = [
        [change.row, change.quantity, f"{change.before:.2f}", f"{change.after:.2f}",
         f"{change.speedup:.2f}x{'*' if change.clear else ' '}"]
        for change in found.changes
    ]
    lines = [f"* they differ in {text}" for text in found.differences]
    lines += [f"* only in {name}: {', '.join(rows)}"
              for name, rows in zip(names, (found.only_before, found.only_after)) if rows]
    text = "Medians in ms; * where the least and most of the two do not meet\n\n" + aligned_table(heads, rows)
    return text + ("\n" + "\n".join(lines) + "\n" if lines else "")


def _change(before: Row, after: Row, name: str) -> Change | None:
    one, other = before.milliseconds(name), after.milliseconds(name)
    if one is None or other is None:
        return None
    a, b = Timing.of(one), Timing.of(other)
    clear = a.maximum < b.minimum or b.maximum < a.minimum
    return Change(after.name, name, a.median, b.median, clear)


def _differences(before: Results, after: Results) -> list[str]:
    """What else is not the same: the model, the machine, versions, settings."""
    found = [
        f"{name}: {one or 'none'} against {other or 'none'}"
        for name in ("model", "dtype", "language_dtype", "attention", "version", "commit")
        if (one := getattr(before, name)) != (other := getattr(after, name))
    ]
    for name in ("card", "processor", "threads", "driver"):
        one, other = before.machine.get(name), after.machine.get(name)
        if one != other:
            found.append(f"{name}: {one} against {other}")
    found += _versions(before.machine.get("versions", {}), after.machine.get("versions", {}))
    for setting in fields(before.settings):
        one, other = getattr(before.settings, setting.name), getattr(after.settings, setting.name)
        if one != other and setting.name not in NO_MATTER:
            found.append(f"{setting.name}: {one} against {other}")
    return found


def _versions(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: {before.get(name, 'none')} against {after.get(name, 'none')}"
        for name in sorted({*before, *after}) if before.get(name) != after.get(name)
    ]
