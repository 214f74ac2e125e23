"""Segments and plans: the loop-free form against the oracle, and what every legal budget must give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlytom import reference
from earlytom.errors import ConfigError, InputError
from earlytom.frames import apply_plan, merge_rules, plan, segments, similarity
from tests.cases import cases, spans


@st.composite
def clips(draw, most_frames=24):
    """Hidden states [T, S, D] that drift and cut, with settings for the segments."""
    frames = draw(st.integers(1, most_frames))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drift = draw(st.sampled_from([0.05, 0.3, 0.8, 3.0]))
    cuts = draw(st.sampled_from([0.0, 0.15, 0.5]))
    steps = torch.randn(frames, 5, 6, generator=generator) * drift
    fresh = torch.randn(frames, 5, 6, generator=generator) * 2
    hidden = [fresh[0]]
    for t in range(1, frames):
        cut = torch.rand((), generator=generator) < cuts
        hidden.append(fresh[t] if cut else hidden[-1] + steps[t])
    settings = {
        "tau": draw(st.sampled_from([-0.2, 0.3, 0.6, 0.8, 0.95])),
        "max_window": draw(st.integers(2, 9)),
        "ema": draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
    }
    return torch.stack(hidden), settings


def as_pairs(parts):
    return sorted(set(zip(parts.first.tolist(), parts.last.tolist())))


def oracle(hidden, settings):
    """Merged frames of the oracle, and a matrix that makes them: what it does to the rows of an identity."""
    received = torch.eye(len(hidden))[:, :, None].expand(-1, -1, hidden.shape[1]).transpose(1, 2)  # [T, S, T]
    mixed = []
    for column in range(len(hidden)):
        merged, mix, _ = reference.merge_frames(hidden, received[..., column], **settings)
        mixed.append(mix[:, 0])
    return merged, torch.stack(mixed, dim=1)


def test_similarity_is_the_mean_cosine_between_patches():
    hidden = torch.randn(5, 7, 4)
    expected = torch.tensor([[reference.cosine(a, b) for b in hidden] for a in hidden])
    torch.testing.assert_close(similarity(hidden), expected, atol=1e-6, rtol=0)


@given(clips())
def test_segments_are_the_oracles(clip):
    hidden, settings = clip
    found = segments(similarity(hidden), **settings)
    assert as_pairs(found) == reference.segment_frames(hidden, **settings)
    longest = max(last - first + 1 for first, last in as_pairs(found))
    assert longest <= settings["max_window"] - 1


@pytest.mark.parametrize("case", cases("merge"), ids=str)
def test_at_the_released_count_the_plan_is_the_released_merging(case):
    settings = case.segment_settings
    alike = similarity(case["hidden"])
    weights = plan(alike, budget=len(case["merged"]), **settings)
    torch.testing.assert_close(apply_plan(weights, case["hidden"]), case["merged"], atol=1e-5, rtol=0)
    torch.testing.assert_close(apply_plan(weights, case["received"]), case["merged_received"], atol=1e-5, rtol=0)
    final = similarity(apply_plan(weights, case["hidden"])) if case.meta["refine"] else alike
    assert as_pairs(segments(final, **settings)) == spans(case["segments"])


@given(clips())
def test_budget_of_the_oracles_count_gives_the_oracles_frames(clip):
    hidden, settings = clip
    merged, matrix = oracle(hidden, settings)
    weights = plan(similarity(hidden), budget=len(merged), **settings)
    # A mix of two frames whose similarities nearly cancel has weights far above 1: compare relative to them.
    scale = matrix.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(weights / scale, matrix / scale, atol=1e-4, rtol=0)


@given(clips(), st.data())
def test_any_legal_budget_leaves_exactly_that_many_frames_in_order(clip, data):
    hidden, settings = clip
    budget = data.draw(st.integers(1, len(hidden)))
    alike = similarity(hidden)
    weights = plan(alike, budget=budget, **settings)
    assert weights.shape == (budget, len(hidden)) and weights.dtype == torch.float32
    scale = weights.abs().sum(-1)
    assert (((weights.sum(-1) - 1) / scale).abs() < 1e-6).all()
    used = weights != 0
    firsts = used.to(torch.int64).argmax(-1)
    assert firsts[0] == 0, "frame 0 is kept, first"
    assert (firsts[1:] > firsts[:-1]).all(), "order is kept"
    assert (used.sum(0) <= 1).all(), "no source frame enters two rows"


@given(clips(), st.data())
def test_frames_go_in_the_specified_order(clip, data):
    """docs/method.md, section 4: the frames of the rules first, each group by similarity to the frame before it."""
    hidden, settings = clip
    budget = data.draw(st.integers(1, len(hidden)))
    alike = similarity(hidden)
    by_rules = merge_rules(alike, segments(alike, **settings)).removed.tolist()
    order = sorted(range(1, len(hidden)), key=lambda i: (not by_rules[i], -alike[i - 1, i].item(), i))
    removed = set(order[: len(hidden) - budget])
    kept = [i for i in range(len(hidden)) if i not in removed]
    weights = plan(alike, budget=budget, **settings)
    beyond = sorted(i for i in removed if not by_rules[i])
    for row, frame in zip(weights, kept):
        following = kept[kept.index(frame) + 1] if frame != kept[-1] else len(hidden)
        joined = [i for i in beyond if frame < i < following]
        members = [frame, *joined]
        partners = {i + 1 for i in members if i + 1 in removed and by_rules[i + 1]}
        support = set(row.nonzero().flatten().tolist())
        assert support <= set(members) | partners
        assert frame in support
        if not partners:
            torch.testing.assert_close(row[members], torch.full((len(members),), 1 / len(members)))


@given(clips())
def test_a_frame_the_budget_brings_back_comes_whole_with_its_partner(clip):
    hidden, settings = clip
    alike = similarity(hidden)
    removed = int(merge_rules(alike, segments(alike, **settings)).removed.sum())
    everything = plan(alike, budget=len(hidden), **settings)
    assert torch.equal(everything, torch.eye(len(hidden)))
    if removed > 1:
        weights = plan(alike, budget=len(hidden) - removed + 1, **settings)
        released = plan(alike, budget=len(hidden) - removed, **settings)
        whole = [row for row in weights.tolist() if sorted(row)[-1] == 1]
        assert len(whole) > sum(sorted(row)[-1] == 1 for row in released.tolist())


def test_equal_frames_lose_the_lower_index_first_but_never_frame_0():
    alike = torch.ones(5, 5)
    weights = plan(alike, budget=3, tau=0.5, max_window=2, ema=0.9)  # M = 2: every frame its own segment, no rule acts
    expected = torch.zeros(3, 5)
    expected[0, :3] = 1 / 3  # frames 1 and 2 go, into frame 0
    expected[1, 3] = expected[2, 4] = 1
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_leading_dimensions_are_independent(lead):
    hidden = torch.randn(*lead, 9, 4, 6).cumsum(-3)
    settings = {"tau": 0.4, "max_window": 5, "ema": 0.9}
    together = plan(similarity(hidden), budget=5, **settings)
    flat = hidden.reshape(-1, 9, 4, 6)
    alone = torch.stack([plan(similarity(x), budget=5, **settings) for x in flat]).view(*lead, 5, 9)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(apply_plan(together, hidden).reshape(-1, 5, 4, 6), torch.stack(
        [torch.einsum("bt,tsd->bsd", w, x) for w, x in zip(alone.reshape(-1, 5, 9), flat)]))


class Planner(torch.nn.Module):
    def forward(self, hidden):
        return plan(similarity(hidden), budget=6, tau=0.4, max_window=6, ema=0.9)


def test_one_exported_program_plans_every_clip():
    generator = torch.Generator().manual_seed(1)
    first, *others = (torch.randn(12, 4, 6, generator=generator).cumsum(0) for _ in range(8))
    program = torch.export.export(Planner(), (first,), strict=True).module()
    plans = [program(hidden) for hidden in others]
    for hidden, weights in zip(others, plans):
        torch.testing.assert_close(weights, Planner()(hidden))
    assert any(not torch.equal(plans[0], other) for other in plans[1:]), "the clips must differ"


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ConfigError, match=r"budget 6 does not fit 5 frames"):
        plan(torch.eye(5), budget=6, tau=0.5, max_window=6, ema=0.9)
    with pytest.raises(ConfigError, match=r"1\.\.5"):
        plan(torch.eye(5), budget=0, tau=0.5, max_window=6, ema=0.9)
    with pytest.raises(InputError, match="square"):
        plan(torch.zeros(5, 4), budget=3, tau=0.5, max_window=6, ema=0.9)
