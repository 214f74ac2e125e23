"""First hop, in float32: the oracle, whose counts come from the data, and the static tower at those counts."""

from __future__ import annotations

import pytest
import torch

from earlytom import reference
from earlytom.checkpoint import load
from earlytom.config import EarlyTomConfig
from earlytom.parity import align, judge, measure, oracle_hop, split_trace
from earlytom.tower import StaticTower
from tests.cases import TINY, cases, small_clip, small_config, small_vision

E2E = cases("e2e/e2e")


def in_sequence(trace, expected):
    """The trace's tokens as the oracle's sequence, for tokens with one newline at the end or none."""
    return torch.cat([*trace.tokens, trace.newlines.expand(-1, expected.shape[-1])])


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, {}),
        ({"contextual": 0.3}, {}),
        ({"pooling": "average", "newline": "grid"}, {"pooling": "average", "newline": "grid"}),
        ({"pooling": "max", "newline": "no_token"}, {"pooling": "max", "newline": "no_token"}),
        ({"merge_layers": (2,), "frame_budgets": (6,)}, {}),
        ({"merge_layers": (), "frame_budgets": (), "retain": 1.0}, {}),
    ],
    ids=["plain", "contextual", "grid", "max", "one layer", "unpruned"],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_choice_and_number_agrees(changes, form, seed):
    vision, config = small_vision(**form), small_config(tau=0.55, **changes)
    clip = small_clip(config.frames, seed=seed)[0]
    expected, _, hop, at_counts, _ = oracle_hop(vision, clip, config)
    verdict = judge(hop)
    assert verdict.passed, verdict
    assert set(hop.plan.shares) == {1.0} and not hop.plan.flips
    assert hop.differences["tokens"].max_abs <= 1e-4 and hop.differences["tokens"].count
    if not config.merge_layers:
        assert torch.equal(in_sequence(expected, expected.tokens[0]), vision.encode_all(clip))
        return
    settings = {**config.segmenting, "merge_layers": config.merge_layers}
    assert list(at_counts.frame_budgets) == reference.frame_counts(vision, clip, **settings)
    assert at_counts.frame_budgets[-1] < config.frames, "the clip must have something to merge"
    if config.newline != "grid":
        tokens = reference.encode_video(
            vision, clip, retain_ratio=config.retain, contextual=config.contextual, **settings
        )
        assert torch.equal(in_sequence(expected, tokens), tokens), "the trace is the oracle itself"


def test_patches_that_the_oracle_rounds_up_are_left_out():
    """The released code rounds up in dynamic frames: what both keep is compared, and nothing is called a flip."""
    expected, _, hop, config, shapes = oracle_hop(small_vision(), small_clip(12, seed=1)[0], small_config(tau=0.55))
    kept, tower_keeps = {len(positions) for positions in expected.positions}, shapes.keep
    assert kept == {tower_keeps, tower_keeps + 1}
    assert hop.differences["tokens"].count == tower_keeps * config.frame_budgets[-1] * 24 and not hop.plan.flips


def test_a_static_tower_with_another_threshold_fails():
    """The hop can fail: same budgets, another tau, so other frames are merged."""
    vision, clip = small_vision(), small_clip(12, seed=3)[0]
    found = oracle_hop(vision, clip, small_config(tau=0.55))
    expected, config = found.expected, found.config.replace(tau=0.9)
    tower = StaticTower(vision, config)
    actual = split_trace(tower.trace(clip[None]), config, tower.shapes)
    verdict = judge(measure(align([expected], actual, config, tower.shapes), ("a", "b"), "fp32"))
    assert not verdict.passed and "plan of merge layer" in verdict.bisect


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, parts=("vision",)).vision


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c.number else [], id=str(c)) for c in E2E]
)
def test_on_the_golden_clip(case, tiny, e2e_frames):
    """And the oracle's trace is the released code's own answer."""
    names = ("tau", "max_window", "ema")
    config = EarlyTomConfig(
        retain=case.meta["retain_ratio"], frames=32, merge_layers=tuple(case.meta["merge_layers"]),
        frame_budgets=tuple(32 for _ in case.meta["merge_layers"]), **{name: case.meta[name] for name in names},
    )
    expected, _, hop, *_ = oracle_hop(tiny, torch.from_numpy(e2e_frames.copy()), config)
    torch.testing.assert_close(in_sequence(expected, case["visual"]), case["visual"], atol=1e-4, rtol=0)
    verdict = judge(hop)
    assert verdict.passed, verdict
    assert set(hop.plan.shares) == {1.0} and hop.differences["tokens"].max_abs <= 1e-4
