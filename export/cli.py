"""The commands `earlytom-export` and `earlytom-verify`: parse, call, print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from earlytom.config import METHODS, POOLING
from earlytom.presets import PRESETS
from engines.bundle.manifest import COMPATIBILITY
from engines.command import guarded

from .settings import numbers

ENGINE_NAMES = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "none")
REAL_CHECKPOINT = "lmms-lab/llava-onevision-qwen2-7b-ov"


def export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earlytom-export",
        description="Export the vision tower of a video LLM with EarlyTom in static shapes: ONNX, engines, a parity "
        "report, in one bundle. Without --checkpoint it exports the built-in demo.",
    )
    add = parser.add_argument
    add("--checkpoint", default="demo", metavar="PATH|HUB_ID", help="directory, hub id, or demo (default)")
    add("--retain", type=float, metavar="R", help="share of visual tokens that reach the LLM (default 0.2)")
    add("--preset", default="videomme", choices=sorted(PRESETS), help="published settings (default videomme)")
    add("--frames", type=int, metavar="T", help="frames sampled from a video (default 32; LLaVA-Video 64)")
    add("--merge-layers", type=numbers, metavar="A,B,C", help="encoder layers after which frames are merged")
    add("--frame-budgets", type=numbers, metavar="A,B,C", help="frames left after each of them")
    add("--tau", type=float, help="similarity below which a new segment starts")
    add("--max-window", type=int, metavar="M", help="a segment holds at most M - 1 frames")
    add("--ema", type=float, help="smoothing of the similarity")
    add("--contextual", type=float, metavar="D", help="share of a dynamic frame's budget for clustered tokens")
    add("--pooling", choices=POOLING, help="in place of the checkpoint's own, for example average for LLaVA-Video")
    add("--inner-layer", type=int, metavar="K", help="LLM layer before which visual tokens are merged, 0 for none")
    add("--inner-ratio", type=float, metavar="RHO", help="share of the visual tokens merged there (default 0.5)")
    add("--inner-method", default=METHODS[0], choices=METHODS, help="how they are chosen")
    add("--from-environment", action="store_true", help="read RETAIN_RATIO, T, M, EMA, PRUNE_LAYERS, ... as defaults")
    add("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="of weights and activations (default fp32)")
    add("--batch", type=int, default=1, metavar="V", help="videos a call (default 1)")
    add("--opset", type=int, help="18 to 20, or 23 with its Attention operator")
    add("--engine", default="auto", metavar="E[,E]", help=f"of {', '.join(ENGINE_NAMES)} (default auto)")
    add("--for", dest="targets", metavar="CARD[,CARD]", help="of a TensorRT-RTX engine: a100,rtx4090 or sm80,sm89")
    add("--hardware-compatibility", default="none", choices=COMPATIBILITY, help="of a TensorRT engine")
    add("--version-compatible", action="store_true", help="a TensorRT engine that later versions run too")
    add("--strip-weights", action="store_true", help="a TensorRT engine that takes its weights from the graph")
    add("--workspace", type=float, default=4.0, metavar="GIB", help="memory a TensorRT kernel may use (default 4)")
    add("--optimization-level", type=int, choices=range(6), metavar="0..5", help="how long TensorRT searches")
    add("--timing-cache", type=Path, metavar="DIR", help="where TensorRT keeps kernel times across builds")
    add("--output", type=Path, metavar="DIR", help="the bundle (default bundles/<checkpoint>-r<retain>)")
    add("--force", action="store_true", help="replace an earlier bundle")
    add("--dry-run", action="store_true", help="print the plan and exit")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="check parity before writing")
    add("--video", type=Path, metavar="FILE", help="clip to verify on (default a synthetic one)")
    add("--save-tensors", type=Path, metavar="DIR", help="write the verified tensors in Polygraphy's format")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--quiet", action="store_true", help="no progress")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`earlytom-export`: exit status 0, 1 with one sentence on an error, 130 when interrupted."""
    parser = export_parser()
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.engine.split(",") if name not in ENGINE_NAMES]
    if unknown:
        parser.error(f"--engine: {', '.join(unknown)!r} is not one of {', '.join(ENGINE_NAMES)}")

    def run() -> int:
        from .job import plan_job, run_job

        job = plan_job(arguments)
        if arguments.dry_run:
            print(json.dumps(job.to_dict(), indent=2) if arguments.json else job.describe())
            return 0
        result = run_job(job)
        if arguments.json:
            print(json.dumps(result, indent=2))
        return 0

    return guarded("earlytom-export", run)


def verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earlytom-verify",
        description="Measure a bundle's parity again: oracle, static tower, ONNX Runtime, every engine that runs here.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="directory that earlytom-export made")
    add("--video", type=Path, metavar="FILE", help="clip to verify on (default a synthetic one)")
    add("--checkpoint", metavar="PATH|HUB_ID", help="the weights, if they are not where the bundle says")
    add("--save-tensors", type=Path, metavar="DIR", help="write inputs and outputs in Polygraphy's format")
    add("--json", action="store_true", help="print the results as JSON")
    add("--quiet", action="store_true", help="print nothing but errors")
    return parser


def verify_main(argv: Sequence[str] | None = None) -> int:
    """`earlytom-verify BUNDLE`: exit status 0 when every hop passes, 1 when one fails or on an error."""
    arguments = verify_parser().parse_args(argv)

    def run() -> int:
        from .job import verify_again

        passed, text = verify_again(arguments)
        if not arguments.quiet or arguments.json:
            print(text)
        return 0 if passed else 1

    return guarded("earlytom-verify", run)
