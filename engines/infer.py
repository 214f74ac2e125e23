"""`earlytom-infer`: ask a bundle about a video, see the answer come and where the time went."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.errors import ConfigError

from .command import guarded

if TYPE_CHECKING:
    from earlytom.pipeline import Answer, EncodedVideo, VideoPipeline
    from earlytom.video import VideoFrames


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="earlytom-infer",
        description="Answer questions about a video with a bundle: its engine encodes, PyTorch's Qwen2 answers.",
    )
    add = made.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="what earlytom-export made")
    add("--video", type=Path, required=True, metavar="FILE")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--interactive", action="store_true", help="ask for further questions about the same video")
    add("--engine", default="auto", help="auto, onnxruntime, tensorrt, tensorrt-rtx or torch (default auto)")
    add("--checkpoint", metavar="PATH|HUB_ID", help="the weights, if they are not where the bundle says")
    add("--device", help="of the language model: cpu, cuda, ... (default cuda where there is one)")
    add("--llm-dtype", choices=("fp32", "fp16", "bf16"), help="default bf16 on a GPU, fp32 on a CPU")
    add("--attention", choices=("sdpa", "eager", "flash_attention_2"), help="of the LLM (default: the best there is)")
    add("--threads", type=int, metavar="N", help="CPU threads of the engine")
    add("--no-cuda-graph", action="store_true", help="run a TensorRT engine without capturing a CUDA graph")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--sample", action="store_true", help="sample instead of taking the likeliest token")
    add("--temperature", type=float, default=None, help="with --sample")
    add("--seed", type=int, default=0, help="with --sample")
    add("--no-inner", action="store_true", help="do not merge visual tokens inside the LLM")
    add("--explain", type=Path, metavar="PNG", help="draw what was kept of the video")
    add("--json", action="store_true", help="print answers and times as JSON instead of text")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 with one sentence on an error, 130 when interrupted."""
    made = parser()
    arguments = made.parse_args(argv)
    if not arguments.prompt and not arguments.interactive:
        made.error("give --prompt TEXT, or --interactive")
    if arguments.max_new_tokens < 1:
        made.error(f"--max-new-tokens is {arguments.max_new_tokens}, it must be at least 1")
    return guarded("earlytom-infer", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    import torch

    from earlytom.checkpoint import load
    from earlytom.pipeline import VideoPipeline
    from earlytom.video import read_frames

    from .bundle.reader import read_bundle
    from .opening import open_runner

    start = time.perf_counter()
    bundle = read_bundle(arguments.bundle)
    manifest = bundle.manifest
    # The video first: it is the cheapest thing that can be wrong.
    video = read_frames(arguments.video, frames=manifest.config.frames, size=manifest.geometry.image_size)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes[arguments.llm_dtype or ("fp32" if torch.device(device).type == "cpu" else "bf16")]
    parts = ("vision", "language") if arguments.engine == "torch" else ("language",)
    name = arguments.checkpoint or manifest.checkpoint["name"]
    model = load(
        name, dtype=dtype, device=device, parts=parts, attn_implementation=arguments.attention,
        pooling=manifest.config.pooling,
    )  # fmt: skip
    bundle.check_weights(model.identity)
    if model.tokenizer is None:
        raise ConfigError(f"the checkpoint {name} has no tokenizer, so a question cannot be put to it")
    runner = open_runner(
        bundle, arguments.engine, threads=arguments.threads, vision=model.vision,
        cuda_graph=not arguments.no_cuda_graph,
    )  # fmt: skip
    with runner:
        _note(arguments, f"engine: {runner.why}")
        pipeline = VideoPipeline(
            lambda frames: runner.run(frames), model.language, model.tokenizer, manifest.config, manifest.shapes,
            model.eos_token_ids,
        )  # fmt: skip
        loaded = time.perf_counter() - start - video.decode_seconds - video.resize_seconds
        encoded = pipeline.encode(torch.from_numpy(video.frames))
        _note(arguments, f"video: {_seen(video, encoded, manifest)}")
        if arguments.explain:
            _explain(arguments.explain, video, encoded, manifest.shapes.pooled_grid)
        answers = []
        for question in arguments.prompt:
            answers.append(_answer(arguments, pipeline, encoded, question))
        if arguments.interactive:
            _converse(arguments, pipeline, encoded)
    times = {
        "load": loaded, "decode": video.decode_seconds, "resize": video.resize_seconds, "vision": encoded.seconds,
    }  # fmt: skip
    _print_times(arguments, times, answers, runner)
    return 0


def _answer(arguments: argparse.Namespace, pipeline: VideoPipeline, encoded: EncodedVideo, question: str) -> Answer:
    """Ask, streaming the text, and say what the LLM took."""
    import torch

    torch.manual_seed(arguments.seed)
    options: dict[str, Any] = {"do_sample": arguments.sample}
    if arguments.sample and arguments.temperature is not None:
        options["temperature"] = arguments.temperature
    if not arguments.json:
        print(f"\n> {question}")
    answer = pipeline.ask(
        encoded,
        question,
        max_new_tokens=arguments.max_new_tokens,
        merge_inside=not arguments.no_inner,
        on_text=None if arguments.json else lambda text: print(text, end="", flush=True),
        **options,
    )
    if not arguments.json:
        print(f"\n  [prefill {answer.prefill_seconds:.3f} s, {len(answer.ids)} tokens, "
              f"{answer.tokens_per_second:.1f} tokens/s]")  # fmt: skip
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
    from earlytom.video.explain import draw_explanation

    draw_explanation(
        video.frames, encoded.positions.cpu(), encoded.dynamic.cpu(), encoded.weights.cpu(), grid=grid,
        timestamps=video.timestamps.tolist(), path=path,
    )  # fmt: skip


def _seen(video: VideoFrames, encoded: EncodedVideo, manifest: Any) -> str:
    total = manifest.config.frames * manifest.shapes.pooled_patches
    return (
        f"{manifest.config.frames} of {video.frame_count} frames -> {len(encoded.weights)} frames, "
        f"{len(encoded.tokens)} visual tokens of {total} ({int(encoded.dynamic.sum())} frames dynamic)"
    )


def _print_times(arguments: argparse.Namespace, times: dict[str, float], answers: list[Answer], runner: Any) -> None:
    if arguments.json:
        rows = [
            {
                "prompt": question, "text": answer.text, "ids": list(answer.ids), "prefill": answer.prefill_seconds,
                "decode": answer.decode_seconds, "tokens_per_second": answer.tokens_per_second,
            }
            for question, answer in zip(arguments.prompt, answers)
        ]  # fmt: skip
        print(json.dumps({"engine": runner.name, "seconds": times, "answers": rows}, indent=2))
        return
    parts = [f"{name} {seconds:.3f} s" for name, seconds in times.items()]
    if answers:
        first = answers[0]
        spent = times["vision"] + first.prefill_seconds
        parts += [
            f"prefill {first.prefill_seconds:.3f} s", f"decode {first.tokens_per_second:.1f} tokens/s",
            f"time to first token (vision + prefill) {spent:.3f} s",
        ]  # fmt: skip
    print("\ntime: " + ", ".join(parts))


def _note(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.json:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
