"""The commands `earlytom-export`, `earlytom-build` and `earlytom-verify`: parse, call, print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from earlytom.config import METHODS, POOLING
from earlytom.dtypes import DTYPES
from earlytom.presets import PRESETS
from engines.command import Parser, guarded
from engines.products import COMPATIBILITY, PRODUCTS

from .progress import Progress
from .settings import ENGINE_NAMES, EngineOptions, ExportOptions, is_preset_file

REAL_CHECKPOINT = "lmms-lab/llava-onevision-qwen2-7b-ov"
Options = TypeVar("Options", bound=EngineOptions)


def numbers(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers separated by commas; an empty text is none."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 20,12,8") from None


def preset_name(text: str) -> str:
    """Argument type: a published preset, or the file of a calibrated one."""
    if text not in PRESETS and not is_preset_file(text):
        raise argparse.ArgumentTypeError(f"there is no {text!r}, only {', '.join(sorted(PRESETS))}, or a file .json")
    return text


def filled(kind: type[Options], arguments: argparse.Namespace) -> Options:
    """The options that were typed: arguments and fields have the same names, and the fields' defaults."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


def export_parser() -> Parser:
    parser = Parser(
        "earlytom-export",
        "Export the vision tower of a video LLM with EarlyTom in static shapes: ONNX, engines, a parity "
        "report, in one bundle. Without --checkpoint it exports the built-in demo.",
    )
    add = parser.add_argument
    add_method_options(parser)
    add("--contextual", type=float, metavar="D", help="share of a dynamic frame's budget for clustered tokens")
    add("--pooling", choices=POOLING, help="in place of the checkpoint's own, for example average for LLaVA-Video")
    add("--inner-layer", type=int, metavar="K", help="LLM layer before which visual tokens are merged, 0 for none")
    add("--inner-ratio", type=float, metavar="RHO", help="share of the visual tokens merged there (default 0.5)")
    add("--inner-method", choices=METHODS, help="how they are chosen")
    add("--inner-as-released", action="store_true",
        help="one LLM layer not causal in prefill, as in the code that made the published figures")
    add("--from-environment", action="store_true", help="read RETAIN_RATIO, T, M, EMA, PRUNE_LAYERS, ... as defaults")
    add("--dtype", choices=tuple(DTYPES), help="of weights and activations (default %(default)s)")
    add("--batch", type=int, metavar="V", help="videos a call (default %(default)s)")
    add("--opset", type=int, help="18 to 20, or 23 with its Attention operator")
    add("--engine", metavar="E[,E]", help=f"of {', '.join(ENGINE_NAMES)} (default %(default)s)")
    _add_engine_options(parser)
    add("--output", type=Path, metavar="DIR", help="the bundle (default bundles/<checkpoint>-r<retain>)")
    add("--force", action="store_true", help="replace an earlier bundle")
    add("--dry-run", action="store_true", help="print the plan and exit")
    add("--verify", action=argparse.BooleanOptionalAction, help="check parity before writing")
    add("--video", type=Path, metavar="FILE", help="clip to verify on (default a synthetic one)")
    add("--save-tensors", type=Path, metavar="DIR", help="write the verified tensors in Polygraphy's format")
    _add_question_options(parser)
    _add_output_options(parser)
    parser.set_defaults(**{field.name: field.default for field in fields(ExportOptions)})
    return parser


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and how its frames are merged, the same for exporting and for calibrating."""
    add = parser.add_argument
    add("--checkpoint", metavar="PATH|HUB_ID", help="directory, hub id, or demo (default %(default)s)")
    add("--retain", type=float, metavar="R", help="share of visual tokens that reach the LLM (default 0.2)")
    add("--preset", type=preset_name, metavar="NAME|FILE",
        help=f"published settings, of {', '.join(sorted(PRESETS))}, or earlytom-calibrate's (default %(default)s)")
    add("--frames", type=int, metavar="T", help="frames sampled from a video (default 32; LLaVA-Video 64)")
    add("--merge-layers", type=numbers, metavar="A,B,C", help="encoder layers after which frames are merged")
    add("--frame-budgets", type=numbers, metavar="A,B,C", help="frames left after each of them")
    add("--tau", type=float, help="similarity below which a new segment starts")
    add("--max-window", type=int, metavar="M", help="a segment holds at most M - 1 frames")
    add("--ema", type=float, help="smoothing of the similarity")


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How engines are built, the same for exporting and for building."""
    add = parser.add_argument
    add("--for", dest="targets", metavar="CARD[,CARD]",
        help="of a TensorRT-RTX engine, and of the times a dry run tells: a100,rtx4090 or sm80,sm89")
    add("--hardware-compatibility", choices=COMPATIBILITY, help="of a TensorRT engine")
    add("--version-compatible", action="store_true", help="a TensorRT engine that later versions run too")
    add("--strip-weights", action="store_true", help="a TensorRT engine that takes its weights from the graph")
    add("--workspace", type=float, metavar="GIB", help="memory a TensorRT kernel may use (default %(default)g)")
    add("--optimization-level", type=int, choices=range(6), metavar="0..5", help="how long TensorRT searches")
    add("--timing-cache", type=Path, metavar="DIR", help="where TensorRT keeps kernel times across builds")


def _add_question_options(parser: argparse.ArgumentParser) -> None:
    """What the language model is asked, the same for exporting and for verifying."""
    add = parser.add_argument
    add("--answers", action=argparse.BooleanOptionalAction,
        help="compare the language model's answers too (default: of the demo)")
    add("--prompt", dest="prompts", action="append", metavar="TEXT", help="ask this, may be given several times")
    add("--questions", type=int, metavar="N", help="how many to ask the demo (default 12)")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def main(argv: Sequence[str] | None = None) -> int:
    """`earlytom-export`: exit status 0, 1 with one sentence on an error, 130 when interrupted."""
    parser = export_parser()
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.engine.split(",") if name not in ENGINE_NAMES]
    if unknown:
        parser.error(f"--engine: {', '.join(unknown)!r} is not one of {', '.join(ENGINE_NAMES)}")

    def run() -> int:
        options = filled(ExportOptions, arguments)
        if options.checkpoint == "demo" and not arguments.quiet:
            print(
                "Exporting the built-in demo checkpoint: real geometry, small, knows drawn clips only. For "
                f"a real one: earlytom-export --checkpoint {REAL_CHECKPOINT} --retain 0.2 --dtype fp16",
                file=sys.stderr, flush=True,
            )
        from .job import plan_job  # torch and all that makes a graph

        progress = Progress(quiet=arguments.quiet)
        job = plan_job(options, progress.say)
        if arguments.dry_run:
            print(json.dumps(job.to_dict(), indent=2) if arguments.json else job.describe())
            return 0
        from .run import run_job

        result = run_job(job, progress)
        if arguments.json:
            print(json.dumps(result.to_dict(), indent=2))
        return 0

    return guarded("earlytom-export", run)


def build_parser() -> Parser:
    parser = Parser(
        "earlytom-build",
        "Add a TensorRT engine to a bundle, built from its graph; the checkpoint is not needed. An engine "
        "with the same file name is replaced. The engine is not verified: earlytom-verify BUNDLE does that.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="directory that earlytom-export made")
    add("--engine", required=True, choices=tuple(PRODUCTS), help="tensorrt builds on this machine's card")
    _add_engine_options(parser)
    _add_output_options(parser)
    parser.set_defaults(**{field.name: field.default for field in fields(EngineOptions)})
    return parser


def build_main(argv: Sequence[str] | None = None) -> int:
    """`earlytom-build BUNDLE`: exit status 0, 1 with one sentence on an error, 130 when interrupted."""
    arguments = build_parser().parse_args(argv)

    def run() -> int:
        from .run import Result, add_engine

        progress = Progress(("read", "build"), quiet=arguments.quiet)
        bundle = add_engine(arguments.bundle, filled(EngineOptions, arguments), progress=progress)
        record = bundle.manifest.engines[-1]
        progress.say(f"added {record.file} to {bundle.path}; not verified yet: earlytom-verify {bundle.path}")
        if arguments.json:
            print(json.dumps(Result(bundle, seconds=progress.seconds).to_dict(), indent=2))
        return 0

    return guarded("earlytom-build", run)


def verify_parser() -> Parser:
    parser = Parser(
        "earlytom-verify",
        "Measure a bundle's parity again: oracle, static tower, ONNX Runtime, every engine that runs here.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="directory that earlytom-export made")
    add("--video", type=Path, metavar="FILE", help="clip to verify on (default a synthetic one)")
    add("--checkpoint", metavar="PATH|HUB_ID", help="the weights, if they are not where the bundle says")
    add("--save-tensors", type=Path, metavar="DIR", help="write inputs and outputs in Polygraphy's format")
    _add_question_options(parser)
    _add_output_options(parser)
    return parser


def verify_main(argv: Sequence[str] | None = None) -> int:
    """`earlytom-verify BUNDLE`: exit status 0 when every hop passes, 1 when one fails or on an error."""
    arguments = verify_parser().parse_args(argv)

    def run() -> int:
        from dataclasses import replace

        from engines.bundle.reader import read_bundle

        from .report import render_report
        from .run import verify_again

        bundle = read_bundle(arguments.bundle)
        report = verify_again(
            bundle, video=arguments.video, checkpoint=arguments.checkpoint, save_tensors=arguments.save_tensors,
            answers=arguments.answers, prompts=arguments.prompts, questions=arguments.questions,
            progress=Progress(("verify",), quiet=arguments.quiet or arguments.json),
        )
        if arguments.json:
            print(json.dumps({"passed": report.passed, "hops": [hop.to_dict() for hop in report.hops]}, indent=2))
        elif not arguments.quiet:
            print(render_report(replace(bundle.manifest, parity=report.hops)))
        return 0 if report.passed else 1

    return guarded("earlytom-verify", run)
