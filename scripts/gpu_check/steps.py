"""The measurements of `gpu_check`, each a function that gives plain JSON; in order of importance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from earlytom.config import ATTENTION_FORMS
from earlytom.dtypes import torch_dtype
from earlytom.flops import tower_flops, unpruned_config
from earlytom.tower import StaticTower, TowerOutputs
from engines.measure.machine import clocks
from engines.measure.timing import Comparison, compare_times, matrix_rate
from export.onnx.exporter import ATTENTION_OPSET

from .demo import first_tokens
from .engines import RTX, TRT, Engines
from .journal import Clock, Journal, Skip, Step
from .parity import Answers, same
from .workshop import Variant, Workshop

MEMORY_RUNS = 1000
WIDTHS = (3584, 896)  # LLaVA-OneVision 7B and 0.5B
# Seconds on an H200 with 16 cores, as long as nothing was measured here.
GUESSES = {"weights": 8.0, "export": 45.0, f"build {TRT}": 120.0, f"build {RTX}": 20.0, f"open {TRT}": 8.0,
           f"open {RTX}": 30.0, "open onnxruntime": 15.0}
QUICK_GUESSES = dict.fromkeys(GUESSES, 3.0)
EAGER, FULL, PRUNED = "torch full, matrix formed", "torch full, fused", "torch pruned, fused"


def all_steps(shop: Workshop, journal: Journal, clock: Clock, dtypes: Sequence[str]) -> list[Step]:
    """Every step, the most telling first: the widest model in the first dtype, then the rest."""
    check = _Check(shop, journal, clock)
    widths = (24,) if shop.quick else WIDTHS
    first = Variant(dtypes[0], widths[0])
    steps = [
        *check.of_variant(first),
        *check.depth(first),
        Step("demo", "first token of the demo from every engine", check.guess(60, 30), check.demo),
    ]
    others = [Variant(dtype, width) for width in widths for dtype in dtypes][1:]
    for variant in sorted(others, key=lambda v: (v.width != first.width, v.dtype != first.dtype)):
        steps += check.of_variant(variant)
    return [Step("matrix rate", "large matrix products", check.guess(6, 1), check.rate), *steps]


class _Check:
    def __init__(self, shop: Workshop, journal: Journal, clock: Clock) -> None:
        self.shop, self.journal, self.clock = shop, journal, clock
        self.answers, self.engines = Answers(shop), Engines(shop)
        self.runs = 10 if shop.quick else 30

    # ---- what there is to do

    def guess(self, seconds: float, quick: float, *work: str) -> Callable[[], float]:
        """An estimate: `seconds` and each kind of work, as long as it took here before, or as guessed."""
        guesses = QUICK_GUESSES if self.shop.quick else GUESSES
        return lambda: (quick if self.shop.quick else seconds) + sum(
            self.shop.learned.get(name, guesses[name]) for name in work
        )

    def engine_guess(self, variant: Variant, product: str, seconds: float = 15) -> Callable[[], float]:
        export = () if variant in self.shop.bundles else ("export",)
        return self.guess(seconds, 2, *export, f"build {product}", f"open {product}")

    def of_variant(self, variant: Variant) -> list[Step]:
        title = f"{variant.dtype} {variant.width}"
        return [
            Step(f"torch {title}", "static tower in PyTorch: parity, time against the full one",
                 self.guess(20, 2, "weights", "weights"), lambda: self.torch(variant)),
            Step(f"{TRT} {title}", "build, parity, time", self.engine_guess(variant, TRT),
                 lambda: self.engine(TRT, variant)),
            Step(f"{RTX} {title}", "build, parity, time", self.engine_guess(variant, RTX),
                 lambda: self.engine(RTX, variant)),
        ]

    def depth(self, variant: Variant) -> list[Step]:
        """What is looked at for one variant only."""
        unpruned = Variant(variant.dtype, variant.width, pruned=False)
        operator = Variant(variant.dtype, variant.width, opset=ATTENTION_OPSET)
        return [
            Step("unpruned", "TensorRT without EarlyTom, against TensorRT with it", self.engine_guess(unpruned, TRT),
                 lambda: self.unpruned(variant, unpruned)),
            Step("graph", "replay of the CUDA graph against plain execution; two threads",
                 self.guess(20, 2), lambda: self.graph(variant)),
            Step("memory", "1,000 runs: does the card's memory grow", self.guess(25, 3), lambda: self.memory(variant)),
            Step("rebuild", "build again from the timing cache", self.guess(60, 2), lambda: self.rebuild(variant)),
            Step("attention", f"opset {ATTENTION_OPSET} with its Attention operator against primitives",
                 self.engine_guess(operator, TRT), lambda: self.attention(variant, operator)),
            Step("onnxruntime", "the graph in ONNX Runtime; every engine against it",
                 self.guess(100, 5, "open onnxruntime"), lambda: self.onnxruntime(variant)),
            Step("oracle", "the released algorithm against the static tower, fp32", self.guess(15, 2),
                 lambda: self.answers.oracle(variant.width)),
        ]

    # ---- measurements

    def rate(self) -> dict[str, Any]:
        size = 8192 if self.shop.device.type == "cuda" else 256
        rates = {
            dtype: matrix_rate(self.shop.device, torch_dtype(dtype), size=size) for dtype in ("fp16", "bf16")
        }
        return {"size": size, "tflops": {dtype: float(f"{rate / 1e12:.3g}") for dtype, rate in rates.items()}}

    def torch(self, variant: Variant) -> dict[str, Any]:
        self._needs_card("the full tower takes minutes on a CPU")
        hop = self.answers.torch(variant)
        times = self.times(variant, (EAGER, FULL, PRUNED))
        return self._timed(times, variant, PRUNED) | {"parity": [hop]}

    def engine(self, product: str, variant: Variant) -> dict[str, Any]:
        record, seconds = self.engines.built(product, variant)
        result: dict[str, Any] = {"build_seconds": round(seconds, 2), "engine": self.engines.facts(variant, record)}
        try:
            runner = self.engines.opened(product, variant, record)
        except Skip as skip:
            raise Skip(str(skip), result) from None
        outputs = runner.run(self.shop.clip)
        result |= {"parity": self.answers.engine(product, variant, outputs), "why": runner.why}
        result |= {"device_memory_bytes": getattr(runner, "device_memory_bytes", None)}
        result |= {"kernels": self.engines.kernels(product, variant)}
        times = self.times(variant, (product, EAGER, PRUNED))
        return result | self._timed(times, variant, product)

    def unpruned(self, variant: Variant, full: Variant) -> dict[str, Any]:
        product = self._product(variant)
        record, seconds = self.engines.built(product, full)
        outputs = self.engines.opened(product, full, record).run(self.shop.clip)
        parity = self.answers.engine(product, full, outputs)
        clip = self.shop.clip
        calls: dict[str, Callable[[], object]] = {
            f"{product}, pruned": lambda: self.shop.runner(variant, product).run(clip),
            f"{product}, unpruned": lambda: self.shop.runner(full, product).run(clip),
        }
        times = self._compare(calls)
        ratio = times.ratio(f"{product}, unpruned", f"{product}, pruned")
        self.shop.release(lambda kept: kept != full)
        return {"engine": product, "build_seconds": seconds, "times": times.to_dict(), "speedup": round(ratio, 3),
                "parity": parity}

    def graph(self, variant: Variant) -> dict[str, Any]:
        product = self._product(variant)
        replayed = self.shop.runner(variant, product)
        plain = self.shop.runner(variant, product, cuda_graph=False)
        clips = self.shop.clips(3)
        expected = [plain.run(clip) for clip in clips]
        equal = [same(a, replayed.run(clip)) for a, clip in zip(expected, clips)]
        repeated = [same(a, plain.run(clip)) for a, clip in zip(expected, clips)]
        times = self._compare(
            {"replayed": lambda: replayed.run(clips[0]), "plain": lambda: plain.run(clips[0])}
        )
        threads = _in_threads(replayed.run, clips, expected)
        self.shop.runners.pop((variant, product, False)).close()
        return {
            "engine": product, "replays": getattr(replayed, "replays_graph", False), "bit_equal": all(equal),
            "plain_repeats_itself": all(repeated), "threads_equal": threads, "times": times.to_dict(),
            "speedup": round(times.ratio("plain", "replayed"), 3),
        }

    def memory(self, variant: Variant) -> dict[str, Any]:
        product = self._product(variant)
        runner, clip, device = self.shop.runner(variant, product), self.shop.clip, self.shop.device

        def free() -> int:
            torch.cuda.synchronize(device)
            return int(torch.cuda.mem_get_info(device)[0])

        for _ in range(20):
            runner.run(clip)
        before, done = free(), 0
        while done < MEMORY_RUNS and self.clock.left > 5:
            for _ in range(min(50, MEMORY_RUNS - done)):
                runner.run(clip)
                done += 1
            torch.cuda.synchronize(device)
        return {"engine": product, "runs": done, "growth_bytes": before - free()}

    def rebuild(self, variant: Variant) -> dict[str, Any]:
        self._product(variant, only=TRT)
        cold = self.journal.result(f"{TRT} {variant.dtype} {variant.width}")
        assert cold is not None
        learned = dict(self.shop.learned)
        _, warm = self.shop.build(variant, TRT, timing_cache=self.shop.folder / "timing")
        self.shop.learned = learned  # a further engine is not built from a full cache
        return {"from_none_seconds": cold["build_seconds"], "from_cache_seconds": warm,
                "speedup": round(cold["build_seconds"] / warm, 2)}

    def attention(self, variant: Variant, operator: Variant) -> dict[str, Any]:
        product = self._product(variant)
        record, seconds = self.engines.built(product, operator)
        outputs = self.engines.opened(product, operator, record).run(self.shop.clip)
        parity = self.answers.engine(product, operator, outputs)
        clip = self.shop.clip
        times = self._compare(
            {
                "primitives": lambda: self.shop.runner(variant, product).run(clip),
                "operator": lambda: self.shop.runner(operator, product).run(clip),
            }
        )
        kernels = self.engines.kernels(product, operator)
        self.shop.release(lambda kept: kept != operator)
        return {
            "engine": product, "build_seconds": seconds, "times": times.to_dict(), "parity": parity, "kernels": kernels,
            "primitives_over_operator": round(times.ratio("primitives", "operator"), 3),
        }

    def onnxruntime(self, variant: Variant) -> dict[str, Any]:
        if self.shop.device.type != "cuda" and not self.shop.quick:
            raise Skip("the full tower takes minutes on a CPU")
        runner = self.shop.runner(variant, "onnxruntime")
        outputs = runner.run(self.shop.clip.to(runner.device))
        result: dict[str, Any] = {"why": runner.why, "parity": self.answers.engine("onnxruntime", variant, outputs)}
        if self.shop.quick or "CUDA" in runner.why:
            result |= self._timed(self.times(variant, ("onnxruntime", PRUNED)), variant, "onnxruntime")
        return result

    def demo(self) -> dict[str, Any]:
        return first_tokens(self.shop)

    # ---- parts

    def times(self, variant: Variant, names: Sequence[str]) -> Comparison:
        shop, clip = self.shop, self.shop.clip

        def tower(pruned: bool, attention: str) -> Callable[[], object]:
            assert attention in ATTENTION_FORMS
            config = shop.config if pruned else unpruned_config(shop.config)
            made = StaticTower(shop.vision(variant.dtype, variant.width), config, attention=attention).eval()

            def call() -> TowerOutputs:
                with torch.no_grad():
                    outputs: TowerOutputs = made(clip)
                    return outputs

            return call

        calls: dict[str, Callable[[], object]] = {}
        for name in names:
            if name in (EAGER, FULL, PRUNED):
                calls[name] = tower(name == PRUNED, "primitives" if name == EAGER else "fused")
            else:
                runner = shop.runner(variant, name)
                calls[name] = partial(runner.run, self.shop.clip.to(runner.device))
        return self._compare(calls)

    def _compare(self, calls: dict[str, Callable[[], object]]) -> Comparison:
        seconds = min(20.0, max(1.0, self.clock.left / 2))
        return compare_times(calls, runs=self.runs, seconds=seconds, device=self.shop.device)

    def _timed(self, times: Comparison, variant: Variant, main: str) -> dict[str, Any]:
        """Times, how much faster `main` is than the others, and its share of the card's measured matrix rate."""
        flops = tower_flops(self.shop.config, self.shop.geometry(variant.width)).total
        achieved = flops / (times.timing(main).median / 1000)
        rate = (self.journal.result("matrix rate") or {}).get("tflops", {}).get(variant.dtype)
        rate = rate if self.shop.device.type == "cuda" else None
        return {
            "main": main, "times": times.to_dict(), "clocks": clocks(), "flops": flops,
            "tflops": round(achieved / 1e12, 4),
            "speedup": {name: round(times.ratio(name, main), 3) for name in times.rounds if name != main},
            "share_of_matrix_rate": round(achieved / 1e12 / rate, 4) if rate else None,
        }

    def _product(self, variant: Variant, only: str | None = None) -> str:
        """The first product that ran the variant. Raises Skip when none did."""
        for product in (only,) if only else (TRT, RTX):
            if self.journal.result(f"{product} {variant.dtype} {variant.width}") is not None:
                return product
        raise Skip(f"needs {only or 'an engine'} of the tower with EarlyTom, which was not measured")

    def _needs_card(self, why: str) -> None:
        if self.shop.device.type != "cuda" and not self.shop.quick:
            raise Skip(f"needs a CUDA device: {why}")


def _in_threads(
    run: Callable[[Tensor], TowerOutputs], clips: Sequence[Tensor], expected: Sequence[TowerOutputs]
) -> bool:
    """Whether two threads that run at once, each on a stream of its own, get the answers expected."""
    found: dict[int, list[bool]] = {}

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = [run(clip) for _ in range(3) for clip in clips]
            torch.cuda.current_stream().synchronize()
        found[index] = [same(a, b) for a, b in zip(list(expected) * 3, outputs)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(found) == 2 and all(all(answers) for answers in found.values())
