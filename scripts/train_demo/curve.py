"""The training's log as a picture: `python -m scripts.train_demo.curve docs/results/train_demo.jsonl curve.png`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlytom.demo.plot import check_plot, new_figure, save_figure
from earlytom.demo.questions import KINDS, OPEN_KINDS
from earlytom.errors import InputError
from engines.command import Parser, guarded

SEEN = ("named", "counted")  # shares of right answers in a tower's stage, whose "shape" and "colour" are losses
SHARES = (*SEEN, *KINDS, *OPEN_KINDS)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's lines in order; of a step that was run again, what came last. Raises InputError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        last = {(row["stage"], row["step"]): row for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no log of the demo's training: {error}") from None
    stages = list(dict.fromkeys(stage for stage, _ in last))
    return [last[key] for key in sorted(last, key=lambda key: (stages.index(key[0]), key[1]))]


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of right answers on training clips against minutes of training, stage after stage."""
    figure = new_figure(9, 4.5)
    axes = figure.add_subplot()
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    begin, labelled = 0.0, set[str]()
    for stage in stages:
        mine = [row for row in rows if row["stage"] == stage]
        shares = SEEN if SEEN[0] in mine[0] else SHARES
        for i, name in enumerate(shares):
            told = [(begin + row["seconds"] / 60, 100 * row[name]) for row in mine if name in row]
            if told:
                axes.plot(*zip(*told), color=f"C{i % 10}", linestyle="--" if i >= 10 else "-",
                          label=None if name in labelled else name)
                labelled.add(name)
        axes.axvline(begin, color="black", alpha=0.3, linewidth=0.8)
        axes.text(begin, 101, f" {stage}", fontsize="x-small", rotation=25, rotation_mode="anchor")
        begin += mine[-1]["seconds"] / 60
    axes.set(xlabel="minutes", ylabel="right on training clips, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower right")
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    made = Parser("train_demo.curve", "Draw the log of the demo's training.")
    made.add_argument("log", type=Path)
    made.add_argument("plot", type=Path, metavar="PNG|SVG")
    arguments = made.parse_args(argv)

    def run() -> int:
        check_plot(arguments.plot)
        draw_curve(read_log(arguments.log), arguments.plot)
        return 0

    return guarded("train_demo.curve", run)


if __name__ == "__main__":
    sys.exit(main())
