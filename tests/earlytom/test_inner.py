"""Inner merging as tensors: the released code's answers, the closed form against the loop, masks, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from earlytom.config import InnerMerging, kept_count
from earlytom.errors import ConfigError, InputError
from earlytom.inner import MergeRequest, attention_plan, check_lengths, merge_tokens, merge_tokens_dpc_knn

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "inner.npz")
CASES = json.loads(str(GOLDEN["meta"]))


def sequential(tokens: Tensor, score: Tensor, count: int) -> tuple[list[int], Tensor]:
    """The definition, one token after another, in float64: kept indices and tokens [count, D]."""
    kept = sorted(sorted(range(len(tokens)), key=lambda i: (-score[i].item(), i))[:count])
    x = tokens.double()
    unit = (x / x.norm(dim=-1, keepdim=True)).float()
    merged = {i: x[i].clone() for i in kept}
    for i in range(len(tokens)):
        if i not in merged:
            similarity = [(unit[i] @ unit[j]).item() for j in kept]
            nearest = kept[similarity.index(max(similarity))]
            merged[nearest] = (merged[nearest] + x[i]) / 2
    return kept, torch.stack([merged[i] for i in kept])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_released_answers(case: int) -> None:
    hidden, score = (torch.from_numpy(GOLDEN[f"{case}_{name}"]) for name in ("hidden", "score"))
    merged, kept = merge_tokens(hidden, score, **CASES[case])
    assert kept.tolist() == GOLDEN[f"{case}_kept"].tolist()
    np.testing.assert_allclose(merged.numpy(), GOLDEN[f"{case}_merged"], rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 40),
    ratio=st.floats(0, 0.99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_closed_form_is_the_loop(length: int, ratio: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(length, 6, generator=generator).to(dtype)
    score = torch.rand(length, generator=generator)
    count = kept_count(length, ratio)
    plan = attention_plan(tokens, score, count=count)
    kept, expected = sequential(tokens, score, count)
    assert plan.kept.tolist() == kept
    torch.testing.assert_close(plan.apply(tokens).double(), expected.to(dtype).double(), rtol=8e-3, atol=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(plan.apply(tokens).double(), expected, rtol=1e-5, atol=1e-6)
    rows = torch.zeros(count).index_add_(0, plan.row, plan.weight)
    torch.testing.assert_close(rows, torch.ones(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_thousands_of_tokens_into_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(1, 3000, 4) * 100).to(dtype)
    merged, kept = merge_tokens(hidden, torch.rand(3000), start=0, length=3000, ratio=0.9999)
    assert merged.shape == (1, 1, 4) and len(kept) == 1
    others = torch.cat([hidden[0, : kept[0]], hidden[0, kept[0] + 1 :]]).double()
    expected = hidden[0, kept[0]].double()
    for token in others:
        expected = (expected + token) / 2
    assert merged.isfinite().all()
    torch.testing.assert_close(merged[0, 0].double(), expected.to(dtype).double(), rtol=1e-3, atol=1e-3)


def test_ties_go_to_the_lower_index() -> None:
    hidden = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [4.0, 0.0], [0.0, 1.0]]])
    merged, kept = merge_tokens(hidden, torch.tensor([0.2, 0.2, 0.2, 0.1, 0.1]), start=0, length=5, ratio=0.4)
    assert kept.tolist() == [0, 1, 2]
    assert merged[0].tolist() == [[2.5, 0.0], [1.0, 0.0], [0.0, 1.0]]  # token 3 is as similar to 0 as to 1
    _, kept = merge_tokens(torch.ones(1, 64, 2), torch.ones(64), start=4, length=60, ratio=0.75)
    assert kept.tolist() == list(range(4 + 15))


def test_a_zero_token_is_no_nan() -> None:
    hidden = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    hidden[0, 3] = 0
    merged, _ = merge_tokens(hidden, torch.linspace(1, 0, 8), start=0, length=8, ratio=0.75)
    assert merged.isfinite().all()


def test_no_loop_over_tokens() -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(length: int) -> int:
        generator = torch.Generator().manual_seed(0)
        hidden, score = torch.randn(1, length, 8, generator=generator), torch.rand(length, generator=generator)
        with Count() as count:
            merge_tokens(hidden, score, start=2, length=length - 4, ratio=0.5)
        return count.calls

    assert calls(12) == calls(400)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_dpc_knn_averages_clusters(ratio: float) -> None:
    torch.manual_seed(0)
    length = 20
    count = kept_count(length, ratio)
    centres = torch.eye(count) * 50  # [count, D], far apart
    label = torch.arange(length) % count
    visual = centres[label] + torch.randn(length, count) * 0.01
    hidden = torch.cat([torch.randn(3, count), visual, torch.randn(2, count)])[None]
    merged, kept = merge_tokens_dpc_knn(hidden, start=3, length=length, ratio=ratio)
    assert kept.tolist() == sorted(kept.tolist()) and len(kept) == 5 + count
    assert kept[:3].tolist() == [0, 1, 2] and kept[-2:].tolist() == [23, 24]
    torch.testing.assert_close(merged[:, [0, 1, 2, -2, -1]], hidden[:, [0, 1, 2, -2, -1]], rtol=0, atol=0)
    groups = label[kept[3:-2] - 3]
    assert sorted(groups.tolist()) == list(range(count))
    expected = torch.stack([visual[label == group].mean(0) for group in groups])
    torch.testing.assert_close(merged[0, 3:-2], expected)


@pytest.mark.parametrize("merge", [lambda h, **k: merge_tokens(h, torch.ones(9), **k), merge_tokens_dpc_knn])
@pytest.mark.parametrize("length, ratio", [(0, 0.5), (1, 0.9), (4, 0.0), (5, 0.05)])
def test_nothing_to_merge(merge, length: int, ratio: float) -> None:  # type: ignore[no-untyped-def]
    hidden = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    merged, kept = merge(hidden, start=2, length=length, ratio=ratio)
    assert kept.tolist() == list(range(9))
    assert torch.equal(merged, hidden)


def test_kept_count_is_the_released_rounding() -> None:
    assert [kept_count(n, 0.5) for n in range(8)] == [0, 1, 1, 2, 2, 2, 3, 4]  # halves to even, but one stays
    assert kept_count(10, 0.99) == 1 and kept_count(10, 0.0) == 10


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"layer": 0}, "at least 1"),
        ({"layer": 1.5}, "integer"),
        ({"layer": True}, "integer"),
        ({"layer": 3, "ratio": 1.0}, "below 1"),
        ({"layer": 3, "ratio": -0.1}, "from 0"),
        ({"layer": 3, "ratio": float("nan")}, "from 0"),
        ({"layer": 3, "ratio": "half"}, "a number"),
        ({"layer": 3, "method": "mean"}, "attention, dpc-knn"),
    ],
)
def test_impossible_settings(settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        InnerMerging(**settings)


@pytest.mark.parametrize(
    "shape, scores, start, length",
    [((2, 6, 4), 6, 0, 2), ((6, 4), 6, 0, 2), ((1, 6, 4), 5, 0, 2), ((1, 6, 4), 6, 4, 3), ((1, 6, 4), 6, -1, 3)],
)
def test_misshapen_input(shape: tuple[int, ...], scores: int, start: int, length: int) -> None:
    with pytest.raises(InputError):
        merge_tokens(torch.zeros(shape), torch.zeros(scores), start=start, length=length, ratio=0.5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_pruned_mask_is_the_mask_with_columns_deleted(data: st.DataObject) -> None:
    tokens, decoded = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 4))
    rows, spans, wanted = [], [], []
    inner = InnerMerging(1, data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.8])))
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.integers(0, tokens - 1))
        start = data.draw(st.integers(first, tokens))
        length = data.draw(st.integers(0, tokens - start))
        row = [0] * first + [1] * (tokens - first)
        row += data.draw(st.lists(st.integers(0, 1), min_size=decoded, max_size=decoded))
        cut = start + length - inner.removed(length)
        rows.append(row)
        spans.append((start, length))
        wanted.append(row[:cut] + row[start + length :])
    request = MergeRequest(inner, tuple((span,) for span in spans))
    mask = torch.tensor(rows)
    width = request.pruned_width(mask[:, :tokens])
    assert width == max(sum(row[: len(row) - decoded]) for row in wanted)
    width += decoded
    expected = [([0] * width + row)[-width:] for row in wanted]
    assert request.pruned_mask(mask, width).int().tolist() == expected


def test_requests() -> None:
    inner = InnerMerging(2, 0.5)
    assert MergeRequest.of(None, [(0, 4)], 1) is None
    assert MergeRequest.of(inner, None, 1) is None
    assert MergeRequest.of(inner, [(3, 0), (3, 1)], 2) is None
    request = MergeRequest.of(inner, torch.tensor([[3, 4], [1, 6]]), 2)
    assert request is not None and request.spans == (((3, 4),), ((1, 6),)) and request.removed == (2, 3)
    for spans in ([(0, 4)], [(0, 4, 1), (0, 4, 1)], [(0, 4), (-1, 4)]):
        with pytest.raises(InputError, match="visual_spans"):
            MergeRequest.of(inner, spans, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("scored", [True, False], ids=["attention", "dpc-knn"])
def test_each_of_several_spans_is_merged_by_itself(scored: bool) -> None:
    """Columns 2..7 and 9..12 of 14: each as if the other were text, in whichever order the spans are given."""
    hidden, score = torch.randn(1, 14, 8), torch.rand(1, 14)
    spans = [(2, 6), (9, 4), (0, 0)]
    request = MergeRequest.of(InnerMerging(1, 0.5), [spans], 1)
    assert request is not None and request.removed == (5,) and request.spans == (((0, 0), (2, 6), (9, 4)),)
    mask, positions = torch.ones(1, 14), torch.arange(14)[None]
    width = request.pruned_width(mask)
    merged, places = request.merge(hidden, score if scored else None, positions, width)
    alone = []
    for start, length in spans[:2]:
        one = MergeRequest.of(InnerMerging(1, 0.5), [(start, length)], 1)
        assert one is not None
        alone.append(one.merge(hidden, score if scored else None, positions, one.pruned_width(mask)))
    (first, at), (second, then) = alone
    assert places[0].tolist() == [p for p in at[0].tolist() if p < 9] + [p for p in then[0].tolist() if p >= 9]
    assert torch.equal(merged, torch.cat([first[:, at[0] < 9], second[:, then[0] >= 9]], dim=1))
    assert request.pruned_mask(mask, width).all()
    with pytest.raises(InputError, match="behind other spans"):
        overlapping = MergeRequest.of(InnerMerging(1, 0.5), [[(2, 6), (7, 4)]], 1)
        assert overlapping is not None
        overlapping.pruned_width(mask)


def test_padding_and_spans_must_fit() -> None:
    request = MergeRequest(InnerMerging(2, 0.5), (((1, 4),),))
    for mask in ([1, 1, 1, 1, 1, 0], [0] * 6, [1, 0, 1, 1, 1, 1]):
        with pytest.raises(InputError, match="padded on the left"):
            request.pruned_width(torch.tensor([mask]))
    for mask in ([0, 0, 1, 1, 1, 1], [1, 1, 1, 1]):
        with pytest.raises(InputError, match="visual span of sample 0"):
            request.pruned_width(torch.tensor([mask]))
    with pytest.raises(InputError, match="visual span of sample 0"):
        request.unpadded_width(4)


@given(
    spans=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=3),
    ratio=st.sampled_from([0.2, 0.5, 0.9]),
)
def test_without_padding_no_mask_is_needed(spans: list[tuple[int, int]], ratio: float) -> None:
    request = MergeRequest(InnerMerging(1, ratio), tuple((span,) for span in spans))
    assert request.unpadded_width(12) == request.pruned_width(torch.ones(len(spans), 12))


def test_a_cache_must_stem_from_the_same_request() -> None:
    request = MergeRequest(InnerMerging(2, 0.5), (((1, 4),),))
    check_lengths([0, 0, 0, 0], request)
    check_lengths([9, 9, 7, 7], request)
    check_lengths([9, 9, 9, 9], None)
    with pytest.raises(InputError, match="other settings"):
        check_lengths([9, 9, 7, 7], None)
    with pytest.raises(InputError, match="other settings"):
        check_lengths([9, 7, 7, 7], request)
    with pytest.raises(InputError, match="nothing had been merged"):
        check_lengths([9, 9, 9, 9], request)
