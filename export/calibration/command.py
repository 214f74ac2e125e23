"""`earlytom-calibrate`: which frame budgets the released rules come to on clips of one's own, and what they cost."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from earlytom.calibration.budgets import DEFAULT_PERCENTILE
from earlytom.errors import ConfigError
from engines.command import Parser, at_least, guarded
from engines.paths import check_directory

from ..cli import add_method_options
from ..progress import Progress
from ..settings import ExportOptions
from .options import METHOD, STAGES, CalibrateOptions

PROGRAM = "earlytom-calibrate"
SKIPPED = 3  # exit status: done, without some of the videos


def parser() -> Parser:
    made = Parser(
        PROGRAM,
        "Count how many frames EarlyTom's released rules leave of your clips, propose frame budgets for the static "
        "tower, and write them as a preset for earlytom-export. Exit status: 0 done, 3 done without the videos that it "
        "names, 1 an error, 2 options that do not fit, 130 interrupted.",
    )
    add = made.add_argument
    add("videos", nargs="+", metavar="VIDEO|DIR|@LIST", help="files, directories, or @FILE with one of either a line")
    add_method_options(made)
    add("--percentile", type=_percentile, metavar="P",
        help=f"of the clips whose released frames the budgets hold, at each layer (default {DEFAULT_PERCENTILE:g})")
    add("--target-flops", type=_flops, metavar="F",
        help="the largest budgets whose tower costs at most F: FLOPs a clip or, up to 1, a share of the unpruned tower")
    add("--compare", type=at_least(0), metavar="N",
        help="clips, the first, on which budgets are run and compared with the released rules (default all)")
    add("--output", type=Path, metavar="FILE.json", help="the preset, for earlytom-export --preset")
    add("--journal", type=Path, metavar="FILE", help="keep results here as they come; the same command goes on from it")
    add("--plot", type=Path, metavar="PNG|SVG", help="draw the histograms (needs matplotlib)")
    add("--workers", type=at_least(0), metavar="N", help="processes that read videos ahead (default %(default)s)")
    add("--strict-frames", action="store_true", help="skip a damaged video, and one with too few frames")
    add("--device", help="of the tower: cpu, cuda, ... (default cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads of the tower")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--quiet", action="store_true", help="no progress")
    made.set_defaults(**{name: getattr(ExportOptions(), name) for name in METHOD}, workers=CalibrateOptions.workers)
    return made


def _percentile(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentile, a number in 0..100")
    return value


def _flops(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, such as 0.4 or 2.5e12")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: see the parser."""
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.percentile is not None and arguments.target_flops is not None:
        made.error("--percentile and --target-flops both choose the budgets: give one of them")
    return guarded(PROGRAM, lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    options = CalibrateOptions(
        videos=tuple(arguments.videos),
        method=ExportOptions(**{name: getattr(arguments, name) for name in METHOD}),
        percentile=DEFAULT_PERCENTILE if arguments.percentile is None else arguments.percentile,
        target_flops=arguments.target_flops, compare=arguments.compare, journal=arguments.journal,
        workers=arguments.workers, strict=arguments.strict_frames, device=arguments.device, threads=arguments.threads,
    )
    from .run import calibrate  # torch
    from .text import describe

    progress = Progress(STAGES, quiet=arguments.quiet)
    try:
        found = calibrate(options, progress)
    except KeyboardInterrupt:
        if options.journal is None:
            raise
        progress.say(f"{PROGRAM}: interrupted; what was done is in {options.journal}, the same command goes on from it")
        return 130
    if arguments.output is not None:
        found.preset(arguments.output.stem).write(arguments.output)
        progress.say(f"wrote {arguments.output}: earlytom-export --preset {arguments.output} takes it")
    if arguments.plot is not None:
        from .picture import draw_histograms

        draw_histograms(found, arguments.plot)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else describe(found))
    return SKIPPED if found.skipped else 0


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for what could not be written in the end: before the work."""
    if arguments.output is not None:
        if arguments.output.suffix != ".json":
            raise ConfigError(f"the preset {arguments.output} must end in .json: by that --preset knows a file")
        check_directory(arguments.output.parent, "the directory of the preset")
    if arguments.plot is not None:
        from earlytom.demo.plot import check_plot

        check_plot(arguments.plot)


if __name__ == "__main__":
    raise SystemExit(main())
