"""Parity of everything that runs the same tower in `gpu_check`, against the float32 static tower on the same clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from earlytom.parity import (
    Hop,
    ScoreErrors,
    VideoTrace,
    align,
    compare,
    judge,
    measure,
    oracle_hop,
    score_errors,
    split_trace,
)
from earlytom.tower import TowerOutputs, TowerTrace

from .workshop import Variant, Workshop

REFERENCE = "static tower, fp32"


class Answers:
    """What was answered so far on the shop's clip: references, score errors of each dtype, outputs of each engine."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self._references: dict[int, VideoTrace] = {}
        self._errors: dict[tuple[str, int], ScoreErrors] = {}
        self._outputs: dict[tuple[str, Variant], TowerOutputs] = {}

    def reference(self, width: int) -> VideoTrace:
        if width not in self._references:
            self._references[width] = self._trace(Variant("fp32", width))
        return self._references[width]

    def oracle(self, width: int) -> dict[str, Any]:
        """The method: the oracle against the static tower at the oracle's own budgets, both float32."""
        shop = self._shop
        found = oracle_hop(shop.vision("fp32", width), shop.clip[0], shop.config)
        return _numbers(found.numbers) | {"frames_left": list(found.config.frame_budgets)}

    def torch(self, variant: Variant) -> dict[str, Any]:
        """The static tower in the variant's dtype against float32, with its scores."""
        actual = self._trace(variant)
        return self._hop(REFERENCE, [self.reference(variant.width)], variant, f"static tower, {variant.dtype}", actual)

    def engine(self, name: str, variant: Variant, outputs: TowerOutputs) -> list[dict[str, Any]]:
        """An engine's answer against float32 and, where it answered, against ONNX Runtime's on the same graph."""
        outputs = TowerOutputs(*(value.cpu() for value in outputs))
        self._outputs[name, variant] = outputs
        if not variant.pruned:
            return [self._plain(name, variant, outputs)]
        hops = [self._hop(REFERENCE, [self.reference(variant.width)], variant, name, self._split(variant, outputs))]
        if name == "onnxruntime":
            others = [key[0] for key in self._outputs if key[1] == variant and key[0] != name]
            return hops + [self._between(other, variant) for other in others]
        return hops + ([self._between(name, variant)] if ("onnxruntime", variant) in self._outputs else [])

    def _between(self, name: str, variant: Variant) -> dict[str, Any]:
        """ONNX Runtime → an engine. Neither shows its scores; those of the float32 tower judge the flips."""
        mine, theirs = (self._split(variant, self._outputs[key, variant]) for key in ("onnxruntime", name))
        scores = self.reference(variant.width)
        if torch.equal(mine.weights > 0, scores.weights > 0):
            mine = mine._replace(similarity=scores.similarity, received=scores.received)
        return self._hop("onnxruntime", [mine], variant, name, theirs)

    def _plain(self, name: str, variant: Variant, outputs: TowerOutputs) -> dict[str, Any]:
        """Nothing is chosen in an unpruned tower: its tokens against PyTorch's in the same dtype."""
        with torch.no_grad():
            expected = self._shop.tower(variant)(self._shop.clip).tokens
        found = compare(expected, outputs.tokens)
        return {"reference": "torch", "actual": name, "passed": found.finite, "reasons": [], **found.to_dict()}

    def _trace(self, variant: Variant) -> VideoTrace:
        shop = self._shop
        tower = shop.tower(variant)
        with torch.no_grad():
            trace = tower.trace(shop.clip)
        (video,) = split_trace(trace, tower.config, tower.shapes)
        if variant.dtype != "fp32":
            self._errors[variant.dtype, variant.width] = score_errors(self.reference(variant.width), video)
        return video

    def _split(self, variant: Variant, outputs: TowerOutputs) -> VideoTrace:
        tower = self._shop.tower(variant)
        return split_trace(TowerTrace(outputs, (), None, None), tower.config, tower.shapes)[0]

    def _hop(
        self, reference: str, expected: Sequence[VideoTrace], variant: Variant, name: str, actual: VideoTrace
    ) -> dict[str, Any]:
        if variant.dtype != "fp32" and (variant.dtype, variant.width) not in self._errors:
            self._trace(Variant(variant.dtype, variant.width))
        errors = None if actual.stages else self._errors.get((variant.dtype, variant.width))
        config, tower = self._shop.config, self._shop.tower(variant)
        aligned = align(expected, [actual], config, tower.shapes, errors=errors)
        return _numbers(measure(aligned, (reference, name), variant.dtype))


def same(a: TowerOutputs, b: TowerOutputs) -> bool:
    """Whether two answers are equal bit for bit."""
    return all(torch.equal(_bits(x), _bits(y)) for x, y in zip(a, b))


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def _numbers(hop: Hop) -> dict[str, Any]:
    """What the JSON file says of one hop."""
    verdict, tokens, plan = judge(hop), hop.differences["tokens"], hop.plan
    return {
        "reference": hop.reference, "actual": hop.actual, "passed": verdict.passed, "reasons": list(verdict.reasons),
        **tokens.to_dict(), "frames_equal": plan.shares.frames, "patches_equal": plan.shares.comparable_patches,
        "flips": plan.flips_total, "near_ties": plan.flips_excused,
    }
