"""`earlytom-clip`: a drawn clip of the demo's small world as a video file, and questions with their right answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from earlytom.demo.world import SPLITS

from .command import Parser, at_least, guarded


def parser() -> Parser:
    made = Parser(
        "earlytom-clip",
        "Draw a clip of coloured shapes, such as the built-in demo was trained on, and write it as a video file.",
    )
    add = made.add_argument
    add("output", type=Path, metavar="OUT.mp4")
    add("--split", default="test", choices=SPLITS, help="the clips of test were never trained on (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--index", type=at_least(0), default=0, metavar="N", help="which clip of the split (default %(default)s)")
    add("--frames", type=at_least(4), default=32, metavar="N", help="default %(default)s")
    add("--rate", type=at_least(1), default=8, metavar="N", help="frames a second (default %(default)s)")
    add("--questions", action="store_true", help="print questions about it, each with its right answer")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 with one sentence on an error, 2 on options that do not fit, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    return guarded("earlytom-clip", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    from earlytom.demo.film import write_film  # NumPy
    from earlytom.demo.questions import questions_of
    from earlytom.demo.world import make_clip

    clip = make_clip(arguments.split, arguments.seed, arguments.index, frames=arguments.frames)
    write_film(clip, arguments.output, rate=arguments.rate)
    print(f"{arguments.output}: {clip.frames} frames, {clip.frames / arguments.rate:.1f} s", file=sys.stderr)
    if arguments.questions:
        for question in questions_of(clip):
            print(f"{question.prompt} -> {question.answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
