"""Time a bundle's engines on this machine, against each other: `python -m scripts.bench --bundle DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.command import Parser, at_least, guarded


def parser() -> Parser:
    made = Parser("bench", "Time a bundle's engines on this machine.")
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
    """Exit status 0, 1 with one sentence on an error, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    return guarded("bench", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    from engines.bundle.reader import read_bundle
    from engines.measure.bench import bench_bundle

    bundle = read_bundle(arguments.bundle)
    vision = None
    if arguments.checkpoint:
        from earlytom.checkpoint import load
        from earlytom.dtypes import torch_dtype
        from engines.opening import torch_device

        vision = load(
            arguments.checkpoint, parts=("vision",), pooling=bundle.manifest.config.pooling, check=bundle.check_weights,
            dtype=torch_dtype(bundle.manifest.dtype), device=torch_device(arguments.device),
        ).vision
    engines = tuple(arguments.engines.split(",")) if arguments.engines else None
    found = bench_bundle(bundle, engines, runs=arguments.runs, device=arguments.device, vision=vision)
    text = json.dumps(found, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    machine = found["machine"]
    lines = [f"{machine['card'] or machine['processor']}, {found['dtype']}"]
    for name, time in found["times"].items():
        lines.append(
            f"{name:14}{time['median_ms']:10.2f} ms ({time['minimum_ms']:.2f}-{time['maximum_ms']:.2f}, {time['runs']} "
            f"runs){found['speedup'][name]:9.2f}x{found['tflops'][name]:10.2f} TFLOP/s  {found['why'][name]}"
        )
    return "\n".join(lines + [f"{name:14} not run: {why}" for name, why in found["not_run"].items()])


if __name__ == "__main__":
    sys.exit(main())
