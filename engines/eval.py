"""`earlytom-eval`: how many questions are answered right, with what is kept of a video by each method and engine.

Questions about drawn clips are asked here (--suite); those of the benchmarks by lmms-eval, whose results --table reads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.demo.report import METHODS
from earlytom.demo.suite import FORMS, Suite, make_suite
from earlytom.demo.world import SPLITS, make_clip
from earlytom.errors import ConfigError, EngineError

from .command import Parser, at_least, guarded
from .products import ENGINES

if TYPE_CHECKING:
    from earlytom.checkpoint import Model
    from earlytom.demo.evaluate import ClipAnswers, Row
    from earlytom.demo.suite import Asked

    from .bundle.reader import Bundle

PROGRAM = "earlytom-eval"


def parser() -> Parser:
    made = Parser(PROGRAM, "Accuracy of the methods, and of a bundle's engines, on questions about drawn clips; or a "
                  "table of what lmms-eval found.")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=("demo",), help="demo: clips and questions drawn by this program")
    what.add_argument("--table", type=Path, nargs="+", metavar="FILE",
        help="print the table of the four benchmarks from result files of lmms-eval, or directories of them, and stop")
    add = made.add_argument
    add("--checkpoint", metavar="PATH|HUB_ID|demo", help="the weights (default the bundle's, or the built-in demo)")
    add("--bundle", type=Path, action="append", default=[], metavar="DIR", help="its engines as rows; may be repeated")
    add("--engine", type=_names(tuple(ENGINES)), metavar="NAME,...",
        help="of the bundles (default each that this machine can run)")
    add("--questions", type=at_least(1), default=100, metavar="N",
        help="how many in all, as many of each kind (default 100)")
    add("--seed", type=int, default=0, help="of clips, options and random patches (default 0)")
    add("--split", choices=SPLITS, default="test", help="default test: with combinations that training never showed")
    add("--form", choices=FORMS, default="choice", help="multiple choice, open answers, or both (default choice)")
    add("--frames", type=at_least(4), metavar="T", help="of a clip (default the bundle's, or 32)")
    add("--methods", type=_names(METHODS), default=METHODS, metavar="NAME,...", help=f"of {','.join(METHODS)}")
    add("--retain", type=_ratios, default=(0.25, 0.20, 0.15, 0.10), metavar="R,...", help="default .25,.20,.15,.10")
    add("--inner", choices=("on", "off", "both"), default="off",
        help="merging inside the LLM (default off); both: controls without; a bundle's rows have the bundle's")
    add("--calibration-clips", type=at_least(1), default=16, metavar="N",
        help="validation clips that the budgets of `calibrated` come from (default 16)")
    add("--device", help="of model and towers: cpu, cuda, ... (default cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads")
    add("--json", nargs="?", const="-", metavar="FILE", help="every answer as JSON: to FILE, or in place of the table")
    add("--output", type=Path, metavar="FILE", help="keep answers here as they come; the same command goes on from it")
    add("--plot", type=Path, metavar="PNG|SVG", help="draw accuracy against visual tokens (needs matplotlib)")
    return made


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(text.split(",")))
        if wrong := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"there is no {wrong[0]!r}, only {', '.join(known)}")
        return found

    return names


def _ratios(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = (math.nan,)
    if not all(0 < ratio <= 1 for ratio in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ratios above 0 and at most 1, such as .25,.1")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 with one sentence on an error, 2 on options that do not fit, 130 when interrupted."""
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.table:
        beside = [name for name, value in vars(arguments).items() if value != made.get_default(name)]
        if beside != ["table"]:
            made.error(f"--table stands alone, without {', '.join(name for name in beside if name != 'table')}")
        return guarded(PROGRAM, lambda: show_table(arguments.table))
    if arguments.engine and not arguments.bundle:
        made.error("--engine goes with --bundle")
    return guarded(PROGRAM, lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    import torch

    from earlytom.checkpoint import load
    from earlytom.demo.evaluate import evaluate
    from earlytom.demo.journal import Journal
    from earlytom.demo.methods import make_rows
    from earlytom.demo.plot import check_plot, plot
    from earlytom.demo.table import markdown
    from earlytom.files import replacing

    from .bundle.reader import read_bundle
    from .opening import torch_device
    from .paths import check_directory

    if arguments.plot:
        check_plot(arguments.plot)
    if arguments.json not in (None, "-"):
        check_directory(Path(arguments.json).parent, "the directory of the JSON")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bundles = [read_bundle(path) for path in arguments.bundle]
    frames = _frames(arguments, bundles)
    suite = make_suite(
        arguments.questions, seed=arguments.seed, split=arguments.split, form=arguments.form, frames=frames
    )
    name = str(arguments.checkpoint or (bundles[0].manifest.checkpoint["name"] if bundles else "demo"))
    device = torch_device(arguments.device)

    def check(identity: Any) -> None:
        for bundle in bundles:
            bundle.check_weights(identity)

    pooling = bundles[0].manifest.config.pooling if bundles else None
    model = load(name, device=device, pooling=pooling, check=check)
    with ExitStack() as stack:
        rows = _bundle_rows(arguments, bundles, model, name, stack)
        rows = make_rows(
            model, methods=arguments.methods, retain=arguments.retain, inner=arguments.inner, frames=frames,
            seed=arguments.seed, calibration=_calibration(arguments, model, frames),
        ) + rows
        progress = _Progress(suite)
        journal = Journal(arguments.output, _key(suite, model, bundles, device)) if arguments.output else None

        def keep(asked: Asked, answers: list[ClipAnswers]) -> None:
            if journal is not None:
                journal.add(answers)
            progress(asked, answers)

        report = evaluate(model, suite, rows, keep, done=journal.done if journal else ())
    content = {"checkpoint": {"name": name, "digest": model.identity.digest}} | report.to_dict()
    if arguments.json == "-":
        print(json.dumps(content, indent=1))
    else:
        print(markdown(report), end="")
        if arguments.json:
            Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
            with replacing(Path(arguments.json)) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(report, arguments.plot)
    return 0


def show_table(paths: Sequence[Path]) -> int:
    """Print what lmms-eval found in these files."""
    from .lmms.results import read_results
    from .lmms.table import markdown

    print(markdown(read_results(paths)), end="")
    return 0


def _frames(arguments: argparse.Namespace, bundles: Sequence[Bundle]) -> int:
    """Frames of a clip. Raises ConfigError when two of the command's wishes differ."""
    wanted = {bundle.manifest.config.frames: f"the bundle {bundle.path}" for bundle in bundles}
    if arguments.frames:
        wanted.setdefault(arguments.frames, "--frames")
    if len(wanted) > 1:
        said = " and ".join(f"{count} by {who}" for count, who in wanted.items())
        raise ConfigError(f"clips cannot have {said}: rows are compared on the same clips")
    return next(iter(wanted), 32)


def _key(suite: Suite, model: Model, bundles: Sequence[Bundle], device: Any) -> str:
    """What answers depend on beside their row, in words: two evaluations of the same key can share them."""
    asked = f"{len(suite.questions)} {suite.form} questions, {suite.split}, seed {suite.seed}, {suite.frames} frames"
    made = [f"{bundle.path} {bundle.manifest.request_key}" for bundle in bundles]
    return ", ".join([asked, f"weights {model.identity.digest}", f"on {device}", *made])


def _calibration(arguments: argparse.Namespace, model: Model, frames: int) -> Iterator[Any]:
    """The clips that budgets are calibrated on, uint8 [T, H, W, 3], drawn as they are asked for."""
    import torch

    from earlytom.demo.evaluate import frames_of

    _say(f"calibrating budgets on {arguments.calibration_clips} clips")
    for index in range(arguments.calibration_clips):
        clip = make_clip("validation", arguments.seed, index, frames=frames)
        yield torch.from_numpy(frames_of(clip, model.geometry.image_size))


def _bundle_rows(
    arguments: argparse.Namespace, bundles: Sequence[Bundle], model: Model, checkpoint: str, stack: ExitStack
) -> list[Row]:
    """A row for each engine of each bundle, opened for as long as `stack`. Raises EngineError when one that was asked
    for, or all of a bundle's, cannot be opened."""
    from earlytom.checkpoint import load
    from earlytom.demo.evaluate import Row
    from earlytom.dtypes import torch_dtype

    from .opening import open_runner, torch_device

    rows: list[Row] = []
    for bundle in bundles:
        manifest, config = bundle.manifest, bundle.manifest.config
        if manifest.batch != 1:
            raise ConfigError(f"the bundle {bundle.path} takes {manifest.batch} videos a call, 1 is needed: export it "
                              "with --batch 1")
        passed = []
        for engine in arguments.engine or ENGINES:
            options: dict[str, Any] = {"threads": arguments.threads}
            if ENGINES[engine].needs_weights:  # in the bundle's dtype; the model's own tower stays in float32
                options["vision"] = load(
                    checkpoint, parts=("vision",), dtype=torch_dtype(manifest.dtype), pooling=config.pooling,
                    device=torch_device(arguments.device),
                ).vision
            try:
                runner = stack.enter_context(open_runner(bundle, engine, **options))
            except EngineError as error:
                if arguments.engine:
                    raise
                passed.append(f"{engine}: {error}")
                continue
            name = f"{engine} {manifest.dtype} r={config.retain:g}" + (" inner" if config.inner else "")
            if len(bundles) > 1:
                name += f" ({bundle.path.name})"
            rows.append(Row(name, _tokens_of(runner, bundle), inner=config.inner, method="engine",
                            retain=config.retain, budgets=config.frame_budgets))
        for note in passed:
            _say(f"no row for {note}")
        if len(passed) == len(ENGINES):
            raise EngineError(f"this machine cannot run the bundle {bundle.path}: {'; '.join(passed)}")
    return rows


def _tokens_of(runner: Any, bundle: Bundle) -> Callable[[Any], Any]:
    """A runner as a row's tower: frames uint8 [T, H, W, 3] -> the visual tokens [N, L] of one clip."""
    from earlytom.tower import split_videos

    def tokens(frames: Any) -> Any:
        (video,) = split_videos(runner.run(frames[None]), bundle.manifest.config, bundle.manifest.shapes.pooled_grid)
        return video.tokens

    return tokens


class _Progress:
    """A line on stderr now and then: how far it is, how long it will take, how it goes."""

    def __init__(self, suite: Suite) -> None:
        self.clips, self.done, self.asked = len(suite.asked), 0, 0
        self.start, self.said = time.monotonic(), 0.0
        self.right: dict[str, list[bool]] = {}

    def __call__(self, asked: Asked, answers: Sequence[ClipAnswers]) -> None:
        self.done += 1
        self.asked += bool(answers)
        for answer in answers:
            self.right.setdefault(answer.row, []).extend(given.right for given in answer.given)
        now = time.monotonic() - self.start
        if now - self.said >= 10 or self.done == self.clips:
            self.said = now
            left = now / max(1, self.asked) * (self.clips - self.done)
            shares = [f"{name} {100 * sum(right) / len(right):.0f}" for name, right in self.right.items()]
            told = f"; % right: {', '.join(shares[:6])}" if shares else ""
            _say(f"clip {self.done} of {self.clips}, {now:.0f} s, about {left:.0f} s left{told}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
