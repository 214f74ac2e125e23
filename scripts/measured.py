"""The measured tables of docs/performance.md, from the results beside it: python -m scripts.measured."""

from __future__ import annotations

import sys
from pathlib import Path

from engines.measure.results import Results
from engines.measure.tables import markdown

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def measured() -> dict[str, str]:
    """Name of a file that `earlytom-bench --output` wrote -> its tables as Markdown."""
    return {path.name: markdown(Results.read(path)) for path in sorted(RESULTS.glob("bench-*.json"))}


def main() -> int:
    for name, text in measured().items():
        print(f"results/{name}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
