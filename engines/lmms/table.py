"""The paper's table of accuracies, made from lmms-eval's result files. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from earlytom.demo.table import aligned_table

from .results import BENCHMARKS, Row, Score

NOTHING = "—"


def baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The unpruned model that a row is measured by: of its checkpoint, or the only one there is."""
    unpruned = [other for other in rows if other.unpruned]
    own = [other for other in unpruned if other.checkpoint == row.checkpoint]
    found = own or (unpruned if not row.checkpoint else [])
    return found[0] if len(found) == 1 else None


def share_of(row: Row, rows: Sequence[Row]) -> float | None:
    """A row's average over the table's benchmarks in percent of the unpruned model's; None unless both have all."""
    base = baseline_of(row, rows)
    own, other = average(row, rows), None if base is None else average(base, rows)
    return None if own is None or not other else 100 * own / other


def average(row: Row, rows: Sequence[Row]) -> float | None:
    """The mean over the benchmarks that any row has; None where this one lacks one of them."""
    titles = _titles(rows)
    if any(title not in row.scores for title in titles):
        return None
    return statistics.fmean(row.scores[title].value for title in titles)


def markdown(rows: Sequence[Row]) -> str:
    """A line for each row, in percent, and below the table what keeps a score from being the benchmark's."""
    titles, several = _titles(rows), len({row.checkpoint for row in rows if row.checkpoint}) > 1
    notes: list[str] = []
    lines = []
    for row in rows:
        name = f"{row.name} ({row.checkpoint})" if several and row.checkpoint else row.name
        cells = [_cell(row.scores.get(title), title, notes) for title in titles]
        tokens = f"{statistics.fmean(row.visual_tokens):.0f}" if row.visual_tokens else NOTHING
        lines.append([name, tokens, *cells, _number(average(row, rows)), _number(share_of(row, rows))])
    text = aligned_table(["", "visual tokens", *titles, "average", "% of unpruned"], lines)
    if not any(row.unpruned for row in rows):
        notes.append("no row is of the unpruned model (retain=1), so there is nothing to measure the others by")
    return text + ("\n" + "".join(f"* {note}\n" for note in notes) if notes else "")


def _titles(rows: Sequence[Row]) -> list[str]:
    return [benchmark.title for benchmark in BENCHMARKS if any(benchmark.title in row.scores for row in rows)]


def _cell(score: Score | None, title: str, notes: list[str]) -> str:
    if score is None or not score.note:
        return NOTHING if score is None else _number(score.value)
    note = f"{title}: {score.note}"
    if note not in notes:
        notes.append(note)
    return f"{_number(score.value)}*"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"
