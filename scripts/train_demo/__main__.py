"""Trains the built-in demo: `python -m scripts.train_demo --home build/train_demo`. Hours on two cores; resumable."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engines.command import Parser, at_least, guarded

from .stages import STAGES


def parser() -> Parser:
    made = Parser("train_demo", "Train the built-in demo: a tower that sees, a language model that answers.")
    add = made.add_argument
    add("--home", type=Path, default=Path("build/train_demo"), metavar="DIR", help="states, log and weights")
    add("--stage", action="append", default=[], choices=[stage.name for stage in STAGES], help="only this one")
    add("--seed", type=int, default=0, help="of the first weights")
    add("--device", default="cpu", help="cpu, cuda, ... (default cpu)")
    add("--workers", type=at_least(0), default=0, metavar="N", help="processes that draw clips ahead")
    add("--times", type=at_least(1), default=1, metavar="N", help="as many times the clips in a step")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads")
    add("--smoke", action="store_true", help="two tiny steps of each stage")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)

    def run() -> int:
        from .run import train

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        print(train(
            arguments.home, seed=arguments.seed, only=arguments.stage, smoke=arguments.smoke, times=arguments.times,
            workers=arguments.workers, device=arguments.device,
        ))
        return 0

    return guarded("train_demo", run)


if __name__ == "__main__":
    sys.exit(main())
