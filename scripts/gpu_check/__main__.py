"""One command on any GPU box: builds the full-size tower with random weights, runs it through every engine, measures.

    PYTHONPATH=. python -m scripts.gpu_check --output gpu.json

Needs this checkout and torch; everything else is used where it is there. Nothing is fetched. Ends within --minutes and
may be ended at any time: the JSON file holds what was measured so far. `--quick` tries everything on a tiny tower.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from earlytom.errors import EarlyTomError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n")[0] if __doc__ else None)
    add = made.add_argument
    add("--output", type=Path, default=Path("gpu_check.json"), metavar="FILE", help="default gpu_check.json")
    add("--minutes", type=float, default=8.0, help="steps that no longer fit are left out (default 8)")
    add("--steps", type=_names, metavar="A,B", help="only steps whose name holds one of these, such as graph,fp16")
    add("--dtype", type=_names, default=("fp16", "bf16"), metavar="A,B", help="in order of importance (fp16,bf16)")
    add("--quick", action="store_true", help="a tiny tower: tries everything, on a CPU too; times mean nothing")
    add("--work", type=Path, metavar="DIR", help="for graphs and engines, gigabytes (default: the temporary folder)")
    add("--keep", action="store_true", help="leave them in --work")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 when a step failed or what must hold does not, 130 or 143 when ended early."""
    arguments = parser().parse_args(argv)
    try:  # not export.cli's `guarded`, which needs packages that may not be here
        return run(arguments, sys.argv if argv is None else ["gpu_check", *argv])
    except EarlyTomError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gpu_check: interrupted before anything was measured", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    from .report import render
    from .run import CheckOptions, run_check

    content = run_check(
        CheckOptions(
            output=arguments.output.absolute(), minutes=arguments.minutes, steps=arguments.steps,
            dtypes=arguments.dtype, quick=arguments.quick, work=arguments.work, keep=arguments.keep,
            command=tuple(command),
        )
    )
    print(render(content))
    if content["interrupted"]:
        return 130 if content["interrupted"] == "Ctrl-C" else 143
    failed = any(step["status"] == "failed" for step in content["steps"])
    return 1 if failed or any(v["passed"] is False for v in content["summary"]["verdicts"]) else 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    sys.exit(main())
