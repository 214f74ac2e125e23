"""A report as a picture: accuracy against visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputError
from ..files import replacing
from .report import Report

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raise ConfigError when a plot cannot be drawn, or not there: asked before the work."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"the plot {path} must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no directory {path.parent} to put the plot in")
    _matplotlib()


def plot(report: Report, path: Path) -> None:
    """One line a method with Wilson's intervals, and the unpruned model across; PNG or SVG by the suffix."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    lines: dict[str, list[Any]] = {}
    for row in report.rows:
        lines.setdefault((row.method or row.name) + (" with inner merging" if row.inner else ""), []).append(row)
    methods = list(dict.fromkeys(row.method for row in report.rows if row.method != "full"))
    for label, rows in lines.items():
        shares = [report.accuracy(row) for row in rows]
        if rows[0].method == "full":
            axes.axhline(100 * shares[0].value, color="black", linestyle=":" if rows[0].inner else "-", label=label)
            axes.axhspan(100 * shares[0].low, 100 * shares[0].high, color="black", alpha=0.08, linewidth=0)
            continue
        heights = [100 * found.value for found in shares]
        below = [100 * (found.value - found.low) for found in shares]
        above = [100 * (found.high - found.value) for found in shares]
        axes.errorbar(
            [row.tokens for row in rows], heights, yerr=[below, above], marker="o", capsize=3, label=label,
            linestyle="--" if rows[0].inner else "-", color=f"C{methods.index(rows[0].method) % 10}",
        )
    suite = report.suite
    axes.set(xlabel="visual tokens", ylabel="right answers, %", ylim=(0, 102),
             title=f"{len(suite.questions)} questions about {len(suite.asked)} clips of {suite.frames} frames")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure; width, height in inches. Raises ConfigError without the package."""
    return _matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure as PNG or SVG, by the suffix: without a date and with a salt of its own, so that the same
    figure is the same file. Raises InputError."""
    svg = path.suffix.lower() == ".svg"
    try:
        with replacing(path) as temporary, _matplotlib().rc_context({"svg.hashsalt": "earlytom"}):
            figure.savefig(temporary, format="svg" if svg else "png", metadata={"Date": None} if svg else None)
    except OSError as error:
        raise InputError(f"the plot cannot be written to {path}: {error.strerror or error}") from None


def _matplotlib() -> Any:
    """The package, with its Figure, which needs no display. Raises ConfigError."""
    try:
        import matplotlib.figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install earlytom-export[plot]") from None
    return matplotlib
