"""A report as Markdown: accuracies by kind with their intervals, and below them the differences. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from .report import Report
from .score import Difference, Share


def markdown(report: Report) -> str:
    """Two tables, percentages with 95 % intervals in brackets; a difference clear of 0 is marked with *."""
    kinds: list[str | None] = [None, *report.suite.kinds]
    heads = ["all" if kind is None else kind for kind in kinds]
    rows = [
        [row.name, f"{row.tokens:.0f}", f"{row.seconds:.2f}", *(_share(report.accuracy(row, kind)) for kind in kinds)]
        for row in report.rows
    ]
    suite = report.suite
    text = (
        f"{len(suite.questions)} questions ({suite.form}) about {len(suite.asked)} clips of {suite.frames} frames, "
        f"split {suite.split}, seed {suite.seed}: % right [95 % interval, Wilson]\n\n"
        + table(["row", "tokens", "tower s", *heads], rows)
    )
    differences = [
        [f"{one.name} − {other.name}", *(_difference(report.difference(one, other, kind)) for kind in kinds)]
        for one, other in report.comparisons()
    ]
    if not differences:
        return text
    return text + (
        "\nDifferences on the same questions, points [95 % interval, paired, by clip]; * where it leaves out 0\n\n"
        + table(["difference", *heads], differences)
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    rule = [("-" if i == 0 else "-:").rjust(width, "-") for i, width in enumerate(widths)]
    lines = [heads, rule, *rows]
    return "".join(
        "| " + " | ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))) + " |\n"
        for line in lines
    )


def _share(found: Share) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.0f}–{100 * found.high:.0f}]"


def _difference(found: Difference) -> str:
    star = "*" if found.clear else ""
    return f"{100 * found.value:+.1f}{star} [{100 * found.low:+.0f}…{100 * found.high:+.0f}]"
