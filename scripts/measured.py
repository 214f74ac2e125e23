"""The measured tables and pictures of docs/performance.md, from the results beside it: python -m scripts.measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engines.command import Parser, guarded
from engines.measure.picture import draw_results
from engines.measure.results import Results
from engines.measure.tables import markdown

DOCS = Path(__file__).parents[1] / "docs"


def measured() -> dict[str, Results]:
    """Name -> what is in docs/results/bench-<name>.json, as `earlytom-bench --output` wrote it."""
    found = sorted((DOCS / "results").glob("bench-*.json"))
    return {path.stem.removeprefix("bench-"): Results.read(path) for path in found}


def main(argv: Sequence[str] | None = None) -> int:
    made = Parser("measured", "Print the measured tables of docs/performance.md.")
    made.add_argument("--plot", action="store_true", help="draw docs/images/bench-*.png as well (needs matplotlib)")
    arguments = made.parse_args(argv)

    def run() -> int:
        for name, results in measured().items():
            print(f"{name}\n\n{markdown(results)}")
            if arguments.plot:
                draw_results(results, DOCS / "images" / f"bench-{name}.png")
        return 0

    return guarded("measured", run)


if __name__ == "__main__":
    sys.exit(main())
