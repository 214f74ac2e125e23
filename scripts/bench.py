"""Time a bundle's engines against each other, towers alone: `python -m scripts.bench --bundle DIR`.

A short form of `earlytom-bench --vision-only`, which measures the rest as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engines.bench import main as bench
from engines.command import Parser, at_least
from engines.measure.settings import BUNDLED, STATIC


def parser() -> Parser:
    made = Parser("bench", "Time a bundle's engines on this machine: earlytom-bench --vision-only, in short.")
    add = made.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="what earlytom-export made")
    add("--runs", type=at_least(1), default=30, metavar="N", help="rounds, after 3 that do not count (default 30)")
    add("--engines", metavar="E[,E]", help="default all that run here; others are held against the first")
    add("--checkpoint", metavar="PATH|HUB_ID", help="the weights: times the PyTorch tower as well")
    add("--device", help="cpu, cuda or cuda:1 (default the best there is)")
    add("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    add("--json", action="store_true", help="print JSON instead of a table")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """As earlytom-bench's: exit status 0, 1 with one sentence on an error, 2 on options that do not fit, 130."""
    arguments = parser().parse_args(argv)
    everything = [*BUNDLED, *([STATIC] if arguments.checkpoint else [])]
    names = arguments.engines.split(",") if arguments.engines else everything
    options = [
        "--vision-only", "--warm-up", "3", "--runs", str(arguments.runs), "--bundle", str(arguments.bundle),
        "--contestants", ",".join(STATIC if name == "torch" else name for name in names),
    ]
    for name in ("checkpoint", "device", "output"):
        if (value := getattr(arguments, name)) is not None:
            options += [f"--{name}", str(value)]
    return bench([*options, "--json"] if arguments.json else options)


if __name__ == "__main__":
    sys.exit(main())
