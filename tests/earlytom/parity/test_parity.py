"""Metrics, plan agreement and the verdict: near-ties are excused, real differences are not."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from earlytom.config import EarlyTomConfig
from earlytom.errors import InputError
from earlytom.frames import plan, segments
from earlytom.parity import (
    TOLERANCES,
    HopReport,
    ScoreErrors,
    VideoTrace,
    agree,
    align,
    compare,
    judge,
    match_frames,
    measure,
    score_errors,
    sources,
    split_trace,
)
from earlytom.parity.intermediates import OF_A_STAGE, Intermediate, intermediates
from earlytom.parity.results import Difference
from earlytom.shapes import derive_shapes
from earlytom.tokens import select_positions
from earlytom.tower import Stage, StaticTower
from earlytom.vision.geometry import VisionGeometry
from earlytom.vision.siglip import pool
from tests.cases import small_clip, small_config, small_vision

values = arrays(np.float32, array_shapes(max_dims=3, max_side=6), elements=st.floats(-1e3, 1e3, width=32))


# Numbers.


@given(values)
def test_nothing_differs_from_itself(a):
    found = compare(a, a.copy())
    assert (found.count, found.max_abs, found.mean_abs, found.relative) == (a.size, 0, 0, 0)
    assert found.cosine == pytest.approx(1) and found.worst_cosine == pytest.approx(1)
    assert found.sqnr_db == math.inf and found.finite
    assert found.rms == pytest.approx(np.sqrt(np.square(a.astype(np.float64)).mean()))


@given(st.data(), values)
def test_metrics_are_what_they_say(data, a):
    b = data.draw(arrays(np.float32, a.shape, elements=st.floats(-1e3, 1e3, width=32)))
    found, error = compare(torch.from_numpy(a), b), np.abs(a.astype(np.float64) - b)
    assert found.max_abs == error.max() and found.mean_abs == pytest.approx(error.mean())
    norm, noise = np.linalg.norm(a.astype(np.float64)), np.linalg.norm(error)
    if noise > 1e-20 and norm > 1e-20:
        assert found.relative == pytest.approx(noise / norm)
        assert found.sqnr_db == pytest.approx(-20 * math.log10(found.relative))
        other = np.linalg.norm(b.astype(np.float64))
        if other > 1e-20:
            assert found.cosine == pytest.approx((a.astype(np.float64) * b).sum() / norm / other, abs=1e-9)
    assert -1 <= found.worst_cosine <= 1
    assert compare(b, a).max_abs == found.max_abs and compare(b, a).cosine == found.cosine


@given(st.data(), values)
def test_a_mask_is_a_selection(data, a):
    b = data.draw(arrays(np.float32, a.shape, elements=st.floats(-1e3, 1e3, width=32)))
    mask = data.draw(arrays(np.bool_, a.shape[:1]))
    assert compare(a, b, mask) == compare(a[mask], b[mask])


def test_one_wrong_token_shows():
    """As one vector of many, a wrong token disappears; the worst cosine finds it."""
    a = torch.randn(500, 16)
    b = a.clone()
    b[123] = -b[123]
    found = compare(a, b)
    assert found.cosine > 0.99 and found.worst_cosine == pytest.approx(-1)


@pytest.mark.parametrize(("bad", "nans", "infs"), [(math.nan, 1, 0), (math.inf, 0, 1), (-math.inf, 0, 1)])
@pytest.mark.parametrize("side", ["expected", "actual", "both"])
def test_nan_and_inf_are_counted_on_either_side(bad, nans, infs, side):
    a, b = np.ones((2, 3)), np.ones((2, 3))
    for array in {"expected": [a], "actual": [b], "both": [a, b]}[side]:
        array[1, 2] = bad
    found = compare(a, b)
    assert (found.nans, found.infs, found.count, found.max_abs) == (nans, infs, 5, 0) and not found.finite
    json.dumps(found.to_dict(), allow_nan=False)


def test_corners_of_compare():
    assert compare(np.zeros(3), np.zeros(3)).cosine == 1
    silent = compare(np.zeros(3), np.ones(3))
    assert silent.relative == math.inf and silent.sqnr_db == -math.inf and silent.cosine == 0
    json.dumps(silent.to_dict(), allow_nan=False)
    assert compare(np.zeros((0, 4)), np.zeros((0, 4))).count == 0
    assert compare(np.float32(2), np.float32(3)).max_abs == 1
    assert compare(np.array([True, False]), np.array([True, True])).max_abs == 1
    with pytest.raises(InputError, match="cannot be compared"):
        compare(np.zeros(3), np.zeros(4))
    with pytest.raises(InputError, match="mask"):
        compare(np.zeros((3, 2)), np.zeros((3, 2)), np.ones(2, bool))


# Plans. A toy backend: it chooses by the rules from whatever scores it is given, and its tokens say what they are.

T, P, WIDTH = 12, 9, 4
GEOMETRY = VisionGeometry(image_size=84, hidden_size=8, heads=1, intermediate_size=8, layers=2, projector_size=WIDTH)
CONFIG = EarlyTomConfig(retain=0.25, frames=T, merge_layers=(1,), frame_budgets=(6,), tau=0.5)
SHAPES = derive_shapes(CONFIG, GEOMETRY)
SETTINGS = CONFIG.segmenting


def toy(alike, final, received):
    """VideoTrace of a backend with the similarities [T, T] and [6, 6] and the attention [6, 9]."""
    weights = plan(alike, budget=6, **SETTINGS)
    dynamic = segments(final, **SETTINGS).dynamic
    positions = select_positions(received, dynamic, SHAPES.keep)
    hidden = (weights @ torch.arange(1.0, T + 1))[:, None, None].expand(6, 36, 8)
    tokens = (weights @ torch.arange(1.0, T + 1))[:, None] * 10 + positions
    tokens = tokens[..., None].expand(*tokens.shape, WIDTH)
    stages = (Stage(alike, weights, hidden),)
    return VideoTrace(
        tuple(tokens), tuple(positions), torch.ones(1, WIDTH), dynamic, weights, stages, final, received
    )


def toy_scores(seed):
    generator = torch.Generator().manual_seed(seed)

    def alike(n):
        half = torch.rand(n, n, generator=generator)
        return ((half + half.T) / 2).fill_diagonal_(1)

    return [alike(T), alike(6), torch.rand(6, P, generator=generator) / P]


def hop_of(a, b, dtype="fp16", errors=None):
    aligned = align([a], [b], CONFIG, SHAPES, errors=errors)
    return measure(aligned, ("a", "b"), dtype)


@given(st.integers(0, 2**16), st.sampled_from([0.0, 1e-4, 1e-2, 0.1]), st.sampled_from([0, 1, 2]))
def test_backends_that_follow_the_rules_differ_only_by_close_choices(seed, noise, which):
    """A choice between two scores that are each off by at most e has a margin of at most 2e."""
    scores = toy_scores(seed)
    other = list(scores)
    moved = noise * (2 * torch.rand(scores[which].shape, generator=torch.Generator().manual_seed(seed)) - 1)
    other[which] = scores[which] + (moved / P if which == 2 else (moved + moved.T) / 2)
    a, b = toy(*scores), toy(*other)
    found = agree(a, b, CONFIG, SHAPES)
    for flip in found.plan.flips:
        assert flip.kind in {0: ("cut", "merge", "rank"), 1: ("cut",), 2: ("patch",)}[which], flip
        assert flip.margin <= 2 * flip.error + flip.rounding
    same = sources(a.weights) == sources(b.weights)
    assert (found.plan.first_layer is None) == same
    assert bool(found.plan.flips) == (
        not same or not torch.equal(a.dynamic, b.dynamic)
        or any(not torch.equal(x, y) for x, y in zip(a.positions, b.positions))
    )
    # Whatever is compared is the same thing on both sides.
    for i, at, j, where in found.tokens:
        assert a.positions[i][at] == b.positions[j][where]
        assert sources(a.weights)[i] == sources(b.weights)[j]
    if not noise:
        assert not found.plan.flips and set(found.plan.shares) == {1.0}
        assert len(found.tokens) == SHAPES.visual_tokens


def near_patch_tie(gap, noise):
    """Two backends whose attention differs by up to `noise`, with a boundary in frame 0 that is `gap` wide."""
    alike, final, received = toy_scores(3)
    a = toy(alike, final, received)
    assert a.dynamic[0]
    order = received[0].argsort(descending=True)
    kept, dropped = order[SHAPES.keep - 1], order[SHAPES.keep]
    received[0, dropped] = received[0, kept] - gap
    moved = received.clone()
    moved[0, dropped] += noise
    return toy(alike, final, received), toy(alike, final, moved), int(kept), int(dropped)


def test_a_near_tie_between_patches_is_excused():
    a, b, kept, dropped = near_patch_tie(gap=1e-4, noise=1.5e-4)
    (flip,) = agree(a, b, CONFIG, SHAPES).plan.flips
    assert (flip.kind, flip.frame, flip.what) == ("patch", 0, f"patch {kept} against {dropped}")
    assert flip.margin == pytest.approx(1e-4, rel=1e-3) and flip.error == pytest.approx(1.5e-4, rel=1e-3)
    assert flip.excused and not flip.tied
    hop = hop_of(a, b)
    assert hop.plan.comparable_equal == hop.plan.comparable - 1
    assert hop.differences["tokens"].count == (SHAPES.visual_tokens - 1) * WIDTH
    assert hop.differences["tokens"].max_abs == 0
    assert not judge(hop_of(a, b, "fp32")).passed, "in fp32 only ties may flip"


def test_a_real_difference_between_patches_is_not_excused():
    """The same flip, but the scores of the two backends agree: one of them chose wrongly."""
    a, b, kept, dropped = near_patch_tie(gap=1e-3, noise=1.5e-3)
    b = b._replace(received=a.received)
    (flip,) = agree(a, b, CONFIG, SHAPES).plan.flips
    assert flip.error == 0 and not flip.excused
    verdict = judge(hop_of(a, b))
    assert not verdict.passed and any("no near-ties" in reason for reason in verdict.reasons)


def test_an_exact_tie_may_flip_even_in_fp32():
    alike, final, received = toy_scores(3)
    order = received[0].argsort(descending=True)
    low, high = sorted(order[SHAPES.keep - 1 : SHAPES.keep + 1].tolist())
    received[0, low] = received[0, high]  # ties go to the lower index
    moved = received.clone()
    moved[0, high] += 2e-8
    a, b = toy(alike, final, received), toy(alike, final, moved)
    (flip,) = agree(a, b, CONFIG, SHAPES).plan.flips
    assert flip.tied and flip.margin == 0
    assert judge(hop_of(a, b, "fp32")).passed


def cut_pair(margin, noise):
    """Two backends that part at a cut of the merge layer: E(0, 1) is `margin` above tau in the first one."""
    alike, final, received = toy_scores(7)
    # E = ema * C[0, 1] + (1 - ema)
    alike[0, 1] = alike[1, 0] = (CONFIG.tau + margin - (1 - CONFIG.ema)) / CONFIG.ema
    moved = alike.clone()
    moved[0, 1] = moved[1, 0] = alike[0, 1] - noise
    return toy(alike, final, received), toy(moved, final, received)


@pytest.mark.parametrize(("noise", "excused"), [(2e-3, True), (0.0, None)])
def test_a_cut_at_tau(noise, excused):
    a, b = cut_pair(margin=1e-3, noise=noise)
    flips = [flip for flip in agree(a, b, CONFIG, SHAPES).plan.flips if flip.kind == "cut" and flip.layer == 1]
    if excused is None:
        assert not flips
        return
    assert flips[0].frame == 1 and flips[0].margin == pytest.approx(1e-3, rel=1e-2) and flips[0].excused
    assert flips[0].error == pytest.approx(noise, rel=1e-2)


def test_a_plan_that_the_rules_do_not_make_is_never_excused():
    """The scores agree, the plan does not: whatever the margin, this is a fault of the plan."""
    scores = toy_scores(5)
    a = toy(*scores)
    weights = a.weights.clone()
    row = int(weights[1].argmax())
    free = next(i for i in range(T) if not weights[:, i].any() or i not in sources(weights)[1])
    weights[1, row], weights[1, free] = 0.5, 0.5
    b = a._replace(weights=weights, stages=(a.stages[0]._replace(weights=weights),))
    found = agree(a, b, CONFIG, SHAPES).plan
    assert found.first_layer == 1 and found.flips[-1].kind == "plan" and not found.flips[-1].excused
    verdict = judge(hop_of(a, b))
    assert not verdict.passed and "weights_1" in verdict.bisect


def test_a_dynamic_mask_that_the_rules_do_not_make_is_never_excused():
    a = toy(*toy_scores(5))
    b = a._replace(dynamic=~a.dynamic)
    found = agree(a, b, CONFIG, SHAPES).plan
    assert [flip.kind for flip in found.flips] == ["plan"] and found.dynamic_equal == 0 and found.comparable == 0
    assert not judge(hop_of(a, b)).passed


def rank_pair(seed):
    """Two backends between which two frames swap, that the budget removes and keeps: 1e-4 apart in the first one."""
    alike, final, received = toy_scores(seed)
    kept = {min(row) for row in sources(toy(alike, final, received).weights)}
    previous = [-1.0, *alike.diagonal(1).tolist()]
    last_out = min((i for i in range(1, T) if i not in kept), key=previous.__getitem__)
    first_in = max(kept, key=previous.__getitem__)
    alike[first_in - 1, first_in] = alike[first_in, first_in - 1] = previous[last_out] - 1e-4
    moved = alike.clone()
    moved[first_in - 1, first_in] = moved[first_in, first_in - 1] = previous[last_out] + 1e-4
    return toy(alike, final, received), toy(moved, final, received), last_out, first_in


def rank_flips(seed):
    a, b, *_ = rank_pair(seed)
    flips = agree(a, b, CONFIG, SHAPES).plan.flips
    return flips if [flip.kind for flip in flips] == ["rank"] else ()  # else the change moved a cut as well


def test_the_budgets_rank_is_named():
    named = [seed for seed in range(20) if rank_flips(seed)]
    assert len(named) > 5
    for seed in named:
        *_, last_out, first_in = rank_pair(seed)
        (flip,) = rank_flips(seed)
        assert flip.frame == last_out and flip.layer == 1 and f"frame {first_in} in the other" in flip.what
        assert flip.margin == pytest.approx(1e-4, rel=1e-2) and flip.excused


def outputs_only(trace):
    return trace._replace(stages=(), similarity=None, received=None)


def test_a_backend_that_shows_outputs_only_is_excused_by_known_errors():
    """A TensorRT engine: no scores of its own, so what its dtype does to them elsewhere is taken."""
    a, b, *_ = near_patch_tie(gap=1e-4, noise=1.5e-4)
    for error, excused in ((2e-4, True), (5e-5, False)):
        (flip,) = agree(a, outputs_only(b), CONFIG, SHAPES, errors=ScoreErrors((0.0, 0.0), error)).plan.flips
        assert flip.excused is excused
    assert not agree(a, outputs_only(b), CONFIG, SHAPES).plan.flips[0].excused, "nothing known excuses nothing"
    a, b, *_ = rank_pair(next(seed for seed in range(20) if rank_flips(seed)))
    assert sources(a.weights) != sources(b.weights)
    for error, excused in ((2e-4, True), (1e-6, False)):
        flips = agree(a, outputs_only(b), CONFIG, SHAPES, errors=ScoreErrors((error, error), 1.0)).plan.flips
        assert flips[0].kind == "frames" and flips[0].excused is excused and flips[0].layer == 1


def test_frames_with_another_history_are_not_compared():
    """Equal mixes that came about at different merge layers went through different encoder layers."""
    eye, pair = torch.eye(4), torch.tensor([[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1.0]])
    early = [Stage(torch.eye(4), pair, torch.zeros(3, 1, 1)), Stage(torch.eye(3), torch.eye(3), torch.zeros(3, 1, 1))]
    late = [Stage(torch.eye(4), eye, torch.zeros(4, 1, 1)), Stage(torch.eye(4), pair, torch.zeros(3, 1, 1))]
    blank = VideoTrace((), (), torch.zeros(0, 1), torch.zeros(3), pair)
    rows = match_frames(blank._replace(stages=tuple(early)), blank._replace(stages=tuple(late)))
    assert rows == (((0, 0), (2, 3)), ((0, 0), (2, 2)))


# The verdict.


@pytest.fixture(scope="module")
def small_pair():
    """A small tower's trace, twice, as lists of videos."""
    tower = StaticTower(small_vision(), small_config(), batch=2)
    trace = tower.trace(small_clip(12, videos=2))
    return split_trace(trace, tower.config, tower.shapes), tower


def judged(pair, changed, dtype):
    videos, tower = pair
    aligned = align(videos, changed, tower.config, tower.shapes)
    return judge(measure(aligned, ("a", "b"), dtype))


@pytest.mark.parametrize("dtype", sorted(TOLERANCES))
def test_equal_backends_pass(small_pair, dtype):
    verdict = judged(small_pair, small_pair[0], dtype)
    assert verdict.passed and not verdict.reasons and verdict.bisect is None


@pytest.mark.parametrize("dtype", sorted(TOLERANCES))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["tokens", "newlines", "hidden"])
def test_nan_and_inf_fail(small_pair, dtype, bad, where):
    first, second = small_pair[0]
    if where == "hidden":
        stage = first.stages[1]._replace(hidden=first.stages[1].hidden.clone())
        stage.hidden[0, 0, 0] = bad
        spoilt = first._replace(stages=(first.stages[0], stage, first.stages[2]))
    elif where == "newlines":
        spoilt = first._replace(newlines=torch.full_like(first.newlines, bad))
    else:
        spoilt = first._replace(tokens=(torch.full_like(first.tokens[0], bad), *first.tokens[1:]))
    verdict = judged(small_pair, (spoilt, second), dtype)
    assert not verdict.passed and any("NaN" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("dtype", "error", "passes"),
    [("fp32", 1e-5, True), ("fp32", 1e-3, False), ("fp16", 1e-2, True), ("fp16", 0.3, False), ("bf16", 0.3, False)],
)
def test_tolerances_of_the_tokens(small_pair, dtype, error, passes):
    """error: of each number, relative to the rms of the tokens."""
    first, second = small_pair[0]
    rms = torch.cat(first.tokens).square().mean().sqrt()
    noisy = first._replace(tokens=tuple(t + error * rms * torch.randn_like(t).clamp(-2, 2) for t in first.tokens))
    assert judged(small_pair, (noisy, second), dtype).passed is passes


def test_a_failed_hop_is_bisected(small_pair):
    first, second = small_pair[0]
    stages = list(first.stages)
    stages[1] = stages[1]._replace(hidden=stages[1].hidden * 1.01)
    stages[2] = stages[2]._replace(hidden=stages[2].hidden * 1.01)
    verdict = judged(small_pair, (first._replace(stages=tuple(stages)), second), "fp32")
    assert verdict.bisect.startswith("hidden_1 is the first out of tolerance: encoder layer 1;")
    verdict = judged(small_pair, (first._replace(tokens=tuple(t + 1 for t in first.tokens)), second), "fp32")
    assert verdict.bisect.startswith("received and all before it are within tolerance")


def test_nothing_to_compare_is_no_pass(small_pair):
    """Two clips: the plans agree nowhere or hardly; that must not look like agreement."""
    videos, tower = small_pair
    other = split_trace(tower.trace(small_clip(12, videos=2, seed=9)), tower.config, tower.shapes)
    assert not judged(small_pair, other, "bf16").passed


@pytest.fixture(scope="module")
def written(small_pair):
    """A report of two clips that differ everywhere, and the JSON that a manifest keeps of it."""
    videos, tower = small_pair
    other = split_trace(tower.trace(small_clip(12, videos=2, seed=9)), tower.config, tower.shapes)
    hop = measure(align(videos, other, tower.config, tower.shapes), ("a", "b"), "fp32")
    endless = Difference(3, 1.0, 0.5, math.inf, 0.0, 0.0, -math.inf, 0.0)
    hop = replace(hop, plan=hop.plan.worst(3), differences={**hop.differences, "hidden_0": endless})
    report = HopReport("a", "b", "fp32", "failed", ("worse",), "hidden_0", hop, {"tokens": {"snr": None}}, "note")
    return report, json.dumps(report.to_dict(), allow_nan=False)


def test_a_hop_survives_json(written):
    report, text = written
    again = HopReport.from_dict(json.loads(text))
    assert again == report and json.dumps(again.to_dict()) == text
    ordered = HopReport.from_dict(json.loads(json.dumps(report.to_dict(), sort_keys=True)))
    assert list(ordered.numbers.differences) == list(report.numbers.differences), "in the order of computation"
    plan = again.numbers.plan
    assert len(plan.flips) == 3 < plan.flips_total and plan.flips[0].excused is report.numbers.plan.flips[0].excused
    # What bundles hold since the first release; their readers count on it.
    assert list(json.loads(text)) == [
        "name", "reference", "actual", "dtype", "status", "bisect", "note", "repeat", "reasons", "differences", "plan",
        "polygraphy",
    ]
    assert {"shares", "flips_total", "flips_excused", "flips", "first_layer"} <= json.loads(text)["plan"].keys()
    assert {"excused", "tied", "margin", "error", "rounding"} <= json.loads(text)["plan"]["flips"][0].keys()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("mood", "good", "unknown mood"),
        ("dtype", 32, "dtype 32"),
        ("status", "perhaps", "'perhaps'"),
        ("reasons", "none", "must be a list"),
        ("differences", {}, "differences of its tokens"),
        ("differences.colour", {}, "what no tower computes"),
        ("differences.tokens", {"count": 1}, "no max_abs"),
        ("differences.tokens.nans", None, "nans None"),
        ("plan.flips_total", "40", "flips_total '40'"),
        ("plan.flips", [{"kind": "cut"}], "no error"),
    ],
)
def test_a_damaged_hop_is_refused(written, path, value, says):
    values = json.loads(written[1])
    *outer, last = path.split(".")
    functools.reduce(dict.__getitem__, outer, values)[last] = value
    with pytest.raises(InputError, match=re.escape(says)):
        HopReport.from_dict(values)


def test_intermediates_are_named_one_way():
    names = [intermediate.to_text() for intermediate in intermediates((0, 12))]
    assert names == [
        "similarity_0", "weights_0", "hidden_0", "similarity_12", "weights_12", "hidden_12", "similarity_final",
        "received",
    ]
    assert [Intermediate.from_text(name) for name in names] == list(intermediates((0, 12))) and not intermediates(())
    assert Stage._fields == OF_A_STAGE


def test_score_errors_stop_where_the_plans_part(small_pair):
    videos, tower = small_pair
    assert score_errors(videos[0], videos[0]) == ScoreErrors((0.0,) * 4, 0.0)
    other = split_trace(tower.trace(small_clip(12, videos=2, seed=9)), tower.config, tower.shapes)[0]
    assert len(score_errors(videos[0], other).similarity) < 4


@pytest.mark.parametrize("newline", ["one_token", "grid", "no_token"])
def test_tokens_are_found_in_the_sequence(newline):
    """Each patch of the trace is the feature of its frame at its position, newlines apart."""
    vision = small_vision(newline=newline)
    tower = StaticTower(vision, small_config(newline=newline))
    trace = tower.trace(small_clip(12))
    (video,) = split_trace(trace, tower.config, tower.shapes)
    hidden = trace.stages[-1].hidden[0]
    features = pool(vision.project(hidden), "bilinear")
    for frame, (tokens, positions) in enumerate(zip(video.tokens, video.positions)):
        torch.testing.assert_close(tokens, features[frame, positions], atol=1e-4, rtol=0)
    assert (video.newlines == vision.image_newline).all()
    assert len(video.newlines) == tower.shapes.newlines
