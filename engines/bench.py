"""`earlytom-bench`: time to first token by stage, and tokens a second, of every way to run the model, side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlytom.dtypes import DTYPES
from earlytom.errors import ConfigError

from .command import Parser, at_least, guarded
from .measure.settings import CONTESTANTS, INNER, PROMPT, Settings, check_contestants

PROGRAM = "earlytom-bench"
FULL_SIZES = ("0.5b", "7b")
PRESET = {"frames": 32, "retain": 0.2}  # without a bundle, whose own hold


def parser() -> Parser:
    made = Parser(
        PROGRAM,
        "Time to first token by stage, tokens a second and memory: full tokens, EarlyTom as released, in static "
        "shapes, compiled, and a bundle's engines, in one process.",
    )
    add = made.add_argument
    add("--bundle", type=Path, metavar="DIR", help="its engines take part, and its configuration holds")
    add("--checkpoint", metavar="PATH|HUB_ID|demo", help="the weights (default the bundle's, or the built-in demo)")
    add("--full-size", metavar="|".join(FULL_SIZES),
        help="random weights in published shapes in place of a checkpoint: speed does not depend on them")
    add("--video", type=Path, metavar="FILE", help="read anew in every round (default a made-up clip, read once)")
    add("--frames", type=at_least(1), metavar="T", help=f"frames sampled (default {PRESET['frames']}, or the bundle's)")
    add("--retain", type=float, metavar="R", help=f"share of the visual tokens (default {PRESET['retain']}, or the "
        "bundle's)")
    add("--prompt", default=PROMPT, metavar="TEXT", help=f"default {PROMPT!r}")
    add("--new-tokens", type=at_least(1), default=16, metavar="N", help="of every answer (default 16)")
    add("--runs", type=at_least(1), default=10, metavar="N", help="rounds that count (default 10)")
    add("--warm-up", type=at_least(0), default=2, metavar="N",
        help="rounds before them (default 2); in the last of them memory is measured on a CPU")
    add("--seconds", type=_seconds, metavar="LIMIT", help="begin no further round after this; one always counts")
    add("--contestants", type=_contestants, default=(), metavar="NAME,...",
        help=f"of {','.join(CONTESTANTS)} (default all that can take part)")
    add("--inner", choices=INNER, default="both", help="merging inside the LLM (default both)")
    add("--vision-only", action="store_true", help="the towers alone: no language model; engines need no weights")
    add("--dtype", choices=tuple(DTYPES),
        help="of towers and LLM (default the bundle's for towers; bf16 on a GPU, else fp32)")
    add("--device", help="cpu, cuda or cuda:1 (default cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads")
    add("--json", action="store_true", help="print JSON instead of Markdown")
    add("--output", type=Path, metavar="FILE", help="write every measured time as JSON, to --compare")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--plot", type=Path, metavar="PNG|SVG", help="draw stacked bars (needs matplotlib)")
    add("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"),
        help="measure nothing: hold B, measured before with --output, against A")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 with one sentence on an error, 2 on options that do not fit, 130 when interrupted."""
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.compare:
        return guarded(PROGRAM, lambda: compare_files(arguments))
    try:
        settings = _settings(arguments)
    except ConfigError as error:
        made.error(str(error))
    return guarded(PROGRAM, lambda: run(arguments, settings))


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    from earlytom.demo.plot import check_plot

    from .measure.picture import draw_results
    from .measure.results import write_text
    from .measure.tables import markdown
    from .paths import check_directory

    for path, what in ((arguments.output, "JSON"), (arguments.markdown, "tables")):
        if path is not None:
            check_directory(path.absolute().parent, f"the directory of the {what}")
    if arguments.plot is not None:
        check_plot(arguments.plot)  # before the work

    from .measure.bench import bench

    results = bench(settings, tell=lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.output is not None:
        write_text(arguments.output, results.to_json())
    if arguments.markdown is not None:
        write_text(arguments.markdown, markdown(results))
    if arguments.plot is not None:
        draw_results(results, arguments.plot)
    print(results.to_json() if arguments.json else markdown(results), end="")
    return 0


def compare_files(arguments: argparse.Namespace) -> int:
    """What has changed from the first file of --compare to the second; with --plot, the second is drawn."""
    from earlytom.demo.plot import check_plot

    from .measure.compare import compare, comparison_markdown
    from .measure.picture import draw_results
    from .measure.results import Results, write_text

    paths: list[Path] = arguments.compare
    before, after = (Results.read(path) for path in paths)
    found = compare(before, after)
    names = (paths[0].name, paths[1].name)
    text = comparison_markdown(found, names if names[0] != names[1] else (str(paths[0]), str(paths[1])))
    if arguments.markdown is not None:
        write_text(arguments.markdown, text)
    if arguments.plot is not None:
        check_plot(arguments.plot)
        draw_results(after, arguments.plot)
    print(json.dumps(found.to_dict(), indent=1) + "\n" if arguments.json else text, end="")
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """Raises ConfigError for options that do not go together."""
    if arguments.full_size not in (None, *FULL_SIZES, "tiny"):
        raise ConfigError(f"--full-size is {arguments.full_size!r}, it must be one of {', '.join(FULL_SIZES)}")
    given = {name: value for name in PRESET if (value := getattr(arguments, name)) is not None}
    if arguments.bundle is not None and given:
        raise ConfigError(f"--{next(iter(given))} does not go with --bundle, which has its own")
    texts: dict[str, Any] = {
        name: str(path) for name in ("bundle", "video") if (path := getattr(arguments, name)) is not None
    }
    same = ("contestants", "checkpoint", "full_size", "prompt", "new_tokens", "runs", "warm_up", "seconds", "inner",
            "vision_only", "dtype", "device", "threads")
    return Settings(**(PRESET | given), **texts, **{name: getattr(arguments, name) for name in same})


def _contestants(text: str) -> tuple[str, ...]:
    try:
        return check_contestants(text.split(","))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
