"""Second hop: the static tower in PyTorch, float32, and the bundle's graph in ONNX Runtime, in the bundle's dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from earlytom.video import read_frames
from earlytom.video.clips import synthetic_clip
from export.verify import verify_bundle
from tests.bundles import golden_bundle, golden_vision, small_bundle
from tests.cases import small_clip, small_vision
from tests.clips import real


def second_hop(report):
    (hop,) = (hop for hop in report.hops if hop.actual == "onnxruntime")
    return hop


@pytest.mark.parametrize("seed", range(3))
def test_float32_graph(seed):
    hop = second_hop(verify_bundle(small_bundle(), small_clip(12, seed=seed)[0], vision=small_vision()))
    assert hop.status == "passed", hop.reasons
    tokens = hop.numbers.differences["tokens"]
    assert tokens.max_abs <= 1e-4 and tokens.count == 30 * 24
    assert set(hop.numbers.plan.shares) == {1.0} and not hop.numbers.plan.flips


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_half_precision_graph_against_the_float32_tower(seed):
    """Clips whose choices are all at least twice as wide as float16's errors in two scores: among 30 patches one
    near-tie would be 3 %, and which way it goes would be the CPU's choice (the clip of seed 2 has one)."""
    hop = second_hop(verify_bundle(small_bundle("fp16"), small_clip(12, seed=seed)[0], vision=small_vision()))
    assert hop.status == "passed", hop.reasons
    differences, plan = hop.numbers.differences, hop.numbers.plan
    assert differences["tokens"].cosine >= 0.999 and plan.shares.comparable_patches >= 0.99
    assert all(flip.excused for flip in plan.flips)
    # It is half precision that is measured, and its scores are seen.
    assert 1e-4 < differences["tokens"].relative < 1e-2
    assert [name for name in differences if name.startswith("hidden")] == ["hidden_0", "hidden_1", "hidden_3"]


def test_videos_of_a_batch():
    hop = second_hop(verify_bundle(small_bundle(batch=2), small_clip(12, videos=2), vision=small_vision()))
    assert hop.status == "passed", hop.reasons
    assert hop.numbers.plan.frames == 12 and hop.numbers.differences["tokens"].count == 2 * 30 * 24


# The golden clip and real ones, on the golden checkpoint at full resolution.


def clip_of(name, e2e_frames):
    if name == "golden":
        return e2e_frames.copy()
    if name == "synthetic":
        return synthetic_clip(32)
    if name == "still":  # four pictures, eight copies each: every similarity within a scene ties
        return np.repeat(e2e_frames[:4], 8, axis=0)
    return read_frames(real(name), frames=32).frames


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("golden", "fp32"),
        *[pytest.param(name, "fp32", marks=pytest.mark.slow) for name in ("synthetic", "bigbuckbunny", "bikes")],
        *[
            pytest.param(name, "fp16", marks=pytest.mark.slow)
            for name in ("golden", "synthetic", "bigbuckbunny", "bikes")
        ],
    ],
)
def test_at_full_resolution(name, dtype, e2e_frames):
    report = verify_bundle(golden_bundle(dtype), clip_of(name, e2e_frames), vision=golden_vision())
    assert report.passed and report.complete, report.reason
    for hop in report.hops:
        tokens, plan = hop.numbers.differences["tokens"], hop.numbers.plan
        if hop.dtype == "fp32":
            assert tokens.max_abs <= 1e-4 and set(plan.shares) == {1.0}
        else:
            assert tokens.cosine >= 0.999 and plan.shares.comparable_patches >= 0.99
            assert all(flip.excused for flip in plan.flips)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_copies_of_a_frame_tie(dtype, e2e_frames):
    """A still or a slide show: which of equal frames goes is anybody's choice, and no fault."""
    report = verify_bundle(golden_bundle(dtype), clip_of("still", e2e_frames), vision=golden_vision())
    hop = second_hop(report)
    assert report.passed, report.reason
    assert all(flip.tied or (dtype == "fp16" and flip.excused) for flip in hop.numbers.plan.flips)
    assert torch.isfinite(torch.tensor([hop.numbers.differences["tokens"].max_abs]))
