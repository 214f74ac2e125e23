"""Results as a picture: a bar for each row, stacked by where the time to the first token goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from earlytom.demo.plot import new_figure, save_figure

from .results import VISION, Results, Row, speedup
from .tables import heading, to_first_token

COLOURS = {
    "decode": "#9a9a9a", "resize": "#bdbdbd", "copy": "#d9d9d9", "splice": "#ffd28a", "prefill": "#f28e2b",
    "first token": "#b5541c",
}
OPAQUE, PATCHES, MERGE, LAST = "#4e79a7", "#c6dbef", "#59a14f", "#1b3a5c"
LAYERS = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c")  # earlier layers are lighter


def draw_results(results: Results, path: Path) -> None:
    """Stacked bars, the first row on top; PNG or SVG by the suffix. Raises ConfigError, InputError."""
    rows = results.rows
    figure = new_figure(11, 1.8 + 0.42 * len(rows))
    axes = figure.add_subplot()
    labels: dict[str, Any] = {}
    longest = max(row.ttft.median for row in rows)
    for place, row in enumerate(rows):
        start = 0.0
        for (span, took), colour in zip(to_first_token(row), _colours(row)):
            bar = axes.barh(place, took, left=start, height=0.72, color=colour, edgecolor="white", linewidth=0.4)
            labels.setdefault(_label(span), bar)
            start += took
        times = speedup(results.base, row, "ttft")
        text = f" {start:.0f} ms" + (f", {times:.2f}x" if times is not None else "")
        axes.text(start + 0.005 * longest, place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * longest)
    axes.set_xlabel("ms, median" if results.settings.vision_only else "ms to the first token, medians of its parts")
    model, where, _ = heading(results).strip().split("  \n")
    axes.set_title(f"{model}\n{where}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    order = sorted(labels, key=_order)
    figure.legend(
        [labels[name] for name in order], order, loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    save_figure(figure, path)


def _label(span: str) -> str:
    """What the legend calls a span: all merging is one."""
    return "merging" if span.startswith("vision: merge") else span.removeprefix("vision: ")


def _order(label: str) -> int:
    """In the legend: as time goes by."""
    first, last = ("decode", "resize", "copy", "patches"), ("merging", VISION, "splice", "prefill", "first token")
    return first.index(label) if label in first else 10 + last.index(label) if label in last else 5


def _colours(row: Row) -> list[str]:
    """Of the spans up to the first token: vision in blue, its merging green, the language model orange."""
    found, layers = [], 0
    for span, _ in to_first_token(row):
        if span in COLOURS:
            found.append(COLOURS[span])
        elif span == VISION:
            found.append(OPAQUE)
        elif "layers" in span:
            found.append(LAYERS[min(layers, len(LAYERS) - 1)])
            layers += 1
        else:
            found.append(PATCHES if "patches" in span else MERGE if "merge" in span else LAST)
    return found
