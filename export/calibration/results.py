"""What each form of merging left of each clip, in memory and, where a journal is kept, on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlytom.calibration.agreement import Merged, Mix
from earlytom.calibration.merging import Form
from earlytom.journal import Journal


@dataclass(frozen=True)
class Entry:
    """clip: identity of its content; form: frame budgets, or None for the released rules."""

    clip: str
    form: Form
    merged: Merged


class Results:
    """Results by clip and form. journal: a file to keep them in, whose results are known from the start, or None; key:
    what else they depend on. Raises ConfigError as Journal does."""

    def __init__(self, journal: Path | None, key: str) -> None:
        self._known: dict[tuple[str, Form], Merged] = {}
        self._journal: Journal[Entry] | None = None
        if journal is not None:
            self._journal = Journal(journal, key, of="calibration", holds="frame counts", write=_written, read=_read)
            for entry in self._journal.done:
                self._known[entry.clip, entry.form] = entry.merged

    def get(self, clip: str, form: Form) -> Merged | None:
        """What is known, or follows: where the released rules leave as many frames, a budget's plan is theirs."""
        released = self._known.get((clip, None))
        if released is not None and released.counts == form:
            return released
        return self._known.get((clip, form))

    def add(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._known[entry.clip, entry.form] = entry.merged
        if self._journal is not None:
            self._journal.add(entries)


def _written(entry: Entry) -> dict[str, Any]:
    form = None if entry.form is None else list(entry.form)
    return {"clip": entry.clip, "form": form, "counts": list(entry.merged.counts), "mix": entry.merged.mix}


def _read(line: dict[str, Any]) -> Entry:
    form, counts, mix = line["form"], line["counts"], line["mix"]
    rows: Mix = tuple(tuple((int(frame), float(weight)) for frame, weight in row) for row in mix)
    return Entry(str(line["clip"]), None if form is None else tuple(map(int, form)),
                 Merged(tuple(map(int, counts)), rows))
