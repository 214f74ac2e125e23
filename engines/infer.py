"""`earlytom-infer`: ask a bundle about a video, see the answer come and where the time went."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.dtypes import DTYPES

from .command import Parser, at_least, guarded
from .products import ENGINES

if TYPE_CHECKING:
    from earlytom.pipeline import Answer, EncodedVideo, VideoPipeline
    from earlytom.video import VideoFrames


def parser() -> Parser:
    made = Parser(
        "earlytom-infer",
        "Answer questions about a video with a bundle: its engine encodes, PyTorch's Qwen2 answers.",
    )
    add = made.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="what earlytom-export made")
    add("--video", type=Path, required=True, metavar="FILE")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--interactive", action="store_true", help="ask for further questions about the same video")
    add("--engine", default="auto", choices=("auto", *ENGINES), help="what runs the tower (default the best there is)")
    add("--frame-budgets", default="bundle", choices=("bundle", "data"),
        help="with --engine torch: frame counts that follow the data, as published, in place of the bundle's")
    add("--checkpoint", metavar="PATH|HUB_ID", help="the weights, if they are not where the bundle says")
    add("--device", help="of the language model: cpu, cuda, ... (default cuda where there is one)")
    add("--device-map", metavar="auto|FILE",
        help="in place of --device: spread the LLM over cards, memory and disk, as it fits or by a JSON file")
    add("--offload-folder", type=Path, metavar="DIR", help="with --device-map: for what of the model lies on disk")
    add("--llm-dtype", choices=tuple(DTYPES), help="default bf16 on a GPU, fp32 on a CPU")
    add("--attention", choices=("sdpa", "eager", "flash_attention_2"), help="of the LLM (default: the best there is)")
    add("--compile", action="store_true",
        help="compile the LLM's decoding (CUDA graphs on a card): the same tokens sooner, after a slow first answer")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads of the engine")
    add("--no-cuda-graph", action="store_true", help="run a TensorRT engine without capturing a CUDA graph")
    add("--strict-frames", action="store_true", help="refuse a damaged video, or one with too few frames")
    add("--max-new-tokens", type=at_least(1), default=128, metavar="N")
    add("--sample", action="store_true", help="sample instead of taking the likeliest token")
    add("--temperature", type=_temperature, help="with --sample")
    add("--seed", type=int, default=0, help="with --sample")
    add("--no-inner", action="store_true", help="do not merge visual tokens inside the LLM")
    add("--no-reuse", action="store_true", help="read the video anew for each question: compare times with it")
    add("--explain", type=Path, metavar="PNG", help="draw what was kept of the video")
    add("--json", action="store_true", help="print answers and times as JSON instead of text")
    add("--verbose", action="store_true", help="say why better engines were passed over")
    return made


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, such as 0.7")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 with one sentence on an error, 2 on options that do not fit, 130 when interrupted."""
    made = parser()
    arguments = made.parse_args(argv)
    if not arguments.prompt and not arguments.interactive:
        made.error("give --prompt TEXT, or --interactive")
    if arguments.temperature is not None and not arguments.sample:
        made.error("--temperature goes with --sample")
    if arguments.frame_budgets == "data" and arguments.engine != "torch":
        made.error("--frame-budgets data goes with --engine torch: an engine's frame counts are fixed")
    if arguments.offload_folder is not None and arguments.device_map is None:
        made.error("--offload-folder goes with --device-map")
    if arguments.compile and arguments.device_map is not None:
        made.error("--compile does not go with --device-map: one graph moves no weights or inputs")
    return guarded("earlytom-infer", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    from earlytom.checkpoint.device_map import read_device_map
    from earlytom.video import check_picture_path, read_frames

    from .bundle.reader import read_bundle
    from .opening import open_pipeline

    if arguments.device_map is not None:
        read_device_map(arguments.device_map)  # a file that is none is told before a video is read
    if arguments.explain:
        check_picture_path(arguments.explain)
    bundle = read_bundle(arguments.bundle)
    config, side = bundle.manifest.config, bundle.manifest.geometry.image_size
    # The video before the models: it is cheap, and what is most often wrong.
    video = read_frames(arguments.video, frames=config.frames, size=side, strict=arguments.strict_frames)
    for note in video.notes:
        _note(arguments, f"warning: {note}")
    start = time.perf_counter()
    with open_pipeline(
        bundle, checkpoint=arguments.checkpoint, engine=arguments.engine, device=arguments.device,
        dtype=arguments.llm_dtype, attention=arguments.attention, frame_budgets=arguments.frame_budgets,
        compile=arguments.compile, device_map=arguments.device_map, offload_folder=arguments.offload_folder,
        threads=arguments.threads, cuda_graph=not arguments.no_cuda_graph,
    ) as pipeline:
        loaded = time.perf_counter() - start
        _note(arguments, f"engine: {_engine(pipeline, arguments.verbose)}")
        encoded = pipeline.encode(video.frames)
        total = config.frames * bundle.manifest.shapes.pooled_patches
        repeats = f", {video.repeated} of them repeats," if video.repeated else ""
        _note(
            arguments,
            f"video: {config.frames} of {video.frame_count} frames{repeats} -> {len(encoded.weights)} frames, "
            f"{len(encoded.tokens)} visual tokens of {total} ({int(encoded.dynamic.sum())} frames dynamic)",
        )
        if arguments.explain:
            _explain(arguments.explain, video, encoded, bundle.manifest.shapes.pooled_grid)
        answers = [_answer(arguments, pipeline, encoded, question) for question in arguments.prompt]
        if arguments.interactive:
            _converse(arguments, pipeline, encoded)
    times = {
        "load": loaded, "decode": video.decode_seconds, "resize": video.resize_seconds, "vision": encoded.seconds,
    }
    if arguments.json:
        rows = [
            {"prompt": question, "text": answer.text, "ids": list(answer.ids), "prefill": answer.prefill_seconds,
             "decode": answer.decode_seconds, "tokens_per_second": answer.tokens_per_second}
            for question, answer in zip(arguments.prompt, answers)
        ]
        engine = getattr(pipeline.encoder, "name", arguments.engine)
        print(json.dumps({"engine": engine, "seconds": times, "answers": rows}, indent=2))
    else:
        _print_times(times, answers)
    return 0


def _engine(pipeline: VideoPipeline, verbose: bool) -> str:
    """On what the tower runs, in one short line; why not on something better, when that is asked for."""
    why = getattr(pipeline.encoder, "why", "torch, frame counts that follow the data")
    passed = getattr(pipeline.encoder, "passed", ())
    if not passed:
        return why
    if verbose:
        return "\n  not ".join((why, *passed))
    return f"{why} (not {', '.join(text.split(':')[0] for text in passed)}: --verbose says why)"


def _answer(arguments: argparse.Namespace, pipeline: VideoPipeline, encoded: EncodedVideo, question: str) -> Answer:
    """Ask, streaming the text, and say what the LLM took."""
    import torch

    torch.manual_seed(arguments.seed)
    options: dict[str, Any] = {"do_sample": arguments.sample}
    if arguments.temperature is not None:
        options["temperature"] = arguments.temperature
    if not arguments.json:
        print(f"\n> {question}")
    answer = pipeline.ask(
        encoded,
        question,
        max_new_tokens=arguments.max_new_tokens,
        merge_inside=not arguments.no_inner,
        reuse=not arguments.no_reuse,
        on_text=None if arguments.json else lambda text: print(text, end="", flush=True),
        **options,
    )
    if not arguments.json:
        print(f"\n  [prefill {answer.prefill_seconds:.3f} s, {len(answer.ids)} tokens, "
              f"{answer.tokens_per_second:.1f} tokens/s]")
    return answer


def _converse(arguments: argparse.Namespace, pipeline: VideoPipeline, encoded: EncodedVideo) -> None:
    while True:
        try:
            question = input("\nAnother question (empty to end): ").strip()
        except EOFError:
            return
        if not question:
            return
        _answer(arguments, pipeline, encoded, question)


def _explain(path: Path, video: VideoFrames, encoded: EncodedVideo, grid: int) -> None:
    from earlytom.video import draw_explanation

    draw_explanation(
        video.frames, encoded.positions.cpu(), encoded.dynamic.cpu(), encoded.weights.cpu(), grid=grid,
        timestamps=video.timestamps.tolist(), path=path,
    )


def _print_times(times: dict[str, float], answers: list[Answer]) -> None:
    parts = [f"{name} {seconds:.3f} s" for name, seconds in times.items()]
    if answers:
        first = answers[0]
        parts += [
            f"prefill {first.prefill_seconds:.3f} s", f"decode {first.tokens_per_second:.1f} tokens/s",
            f"time to first token (vision + prefill) {times['vision'] + first.prefill_seconds:.3f} s",
        ]
    print("\ntime: " + ", ".join(parts))


def _note(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.json:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
