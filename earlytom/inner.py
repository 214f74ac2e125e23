"""Inner merging: half-way through the LLM's prefill, visual tokens nobody looks at are merged into those that stay.

Two methods choose: `attention`, the released code's, and `dpc-knn`, the project page's. The first makes a MergePlan
(which tokens stay, which of them each token goes to, with what weight), and applying it is one weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from .clustering import dpc_knn, merge_clusters
from .config import InnerMerging, kept_count
from .errors import InputError

NEIGHBOURS = 7  # K of DPC-KNN, as in the released code's contextual tokens

# (start, length) of the visual tokens of each sample, or several such pairs for each
Spans = Tensor | Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class MergePlan:
    """Which of L tokens stay and where the others go, as a sparse row-stochastic [n, L] matrix with one entry a column.

    kept [n] int64, rising: the tokens that stay. row [L] int64: the row, 0..n-1, that each token adds to.
    weight [L] float32: how much of it is added; the weights of a row sum to 1.
    """

    kept: Tensor
    row: Tensor
    weight: Tensor

    def apply(self, tokens: Tensor) -> Tensor:
        """tokens [L, D] -> [n, D] of the same dtype, summed in float32."""
        weighted = tokens.to(torch.float32) * self.weight[:, None]
        merged = weighted.new_zeros(len(self.kept), tokens.shape[-1]).index_add_(0, self.row, weighted)
        return merged.to(tokens.dtype)


def attention_plan(tokens: Tensor, score: Tensor, *, count: int) -> MergePlan:
    """The released code's choice among tokens [L, D] with scores [L]: the `count` best stay, in order.

    Every other token, in order, is averaged into the kept token x it is most cosine-similar to: x = (x + token) / 2.
    With m tokens going to x that is x * 2^-m + sum_j token_j * 2^-(m-j+1), j = 1..m, so the j-th weighs 2 to the minus
    (number of tokens from it on that go to x). Ties go to the lower index. Source: `Qwen2Model_earlytom.forward`.
    """
    length = len(tokens)
    stays = torch.zeros(length, dtype=torch.bool, device=tokens.device)
    stays[score.to(torch.float32).sort(descending=True, stable=True).indices[:count]] = True
    order = stays.to(torch.int8).argsort(descending=True, stable=True)  # kept, then merged, each rising
    kept, merged = order[:count], order[count:]

    unit = normalize(tokens.to(torch.float32), dim=-1)
    target = (unit[merged] @ unit[kept].T).argmax(dim=-1)  # [L - count], the first of equals
    incoming = torch.zeros_like(kept).scatter_add_(0, target, torch.ones_like(target))  # m, [count]
    by_target = target.argsort(stable=True)
    first = (incoming.cumsum(0) - incoming)[target[by_target]]
    place = torch.empty_like(target)
    place[by_target] = torch.arange(length - count, device=tokens.device) - first  # j - 1

    row = torch.empty_like(order)
    row[kept] = torch.arange(count, device=tokens.device)
    row[merged] = target
    halvings = torch.empty_like(order)
    halvings[kept] = incoming
    halvings[merged] = incoming[target] - place
    return MergePlan(kept, row, torch.exp2(-halvings.to(torch.float32)))


def merge_tokens(hidden: Tensor, score: Tensor, *, start: int, length: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Merge the visual tokens [start, start + length) of hidden [1, N, D] by their scores (score [N]).

    Returns hidden [1, N', D] with N' = N - length + kept_count(length, ratio), and kept [N'] int64: the columns of
    `hidden` that stay, text included, rising. Raises InputError on shapes that do not fit.
    Source: the released code's inner merging, with its sequential loop in closed form.
    """
    _check(hidden, start, length)
    InnerMerging(layer=1, ratio=ratio)
    if score.shape != hidden.shape[1:2]:
        raise InputError(f"score has shape {tuple(score.shape)}, it must be [{hidden.shape[1]}], one for each token")
    count = kept_count(length, ratio)
    if count == length:
        return hidden, torch.arange(hidden.shape[1], device=hidden.device)
    visual = slice(start, start + length)
    plan = attention_plan(hidden[0, visual], score[visual], count=count)
    return _splice(hidden, plan.apply(hidden[0, visual]), plan.kept, start, length)


def merge_tokens_dpc_knn(hidden: Tensor, *, start: int, length: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Merge the visual tokens [start, start + length) of hidden [1, N, D] into DPC-KNN cluster centres.

    Each centre becomes the plain mean of itself and the tokens nearest to it. Returns as `merge_tokens` does.
    Source: the description of inner merging on the project page.
    """
    _check(hidden, start, length)
    InnerMerging(layer=1, ratio=ratio)
    count = kept_count(length, ratio)
    if count == length:
        return hidden, torch.arange(hidden.shape[1], device=hidden.device)
    visual = hidden[:, start : start + length]
    centres = dpc_knn(visual, clusters=count, neighbours=min(NEIGHBOURS, count))
    tokens = merge_clusters(visual, centres, blend=False)
    return _splice(hidden, tokens[0], centres[0], start, length)


@dataclass(frozen=True)
class MergeRequest:
    """What one call merges: the settings and each sample's visual spans (start, length), as columns of its row.

    The released code knows one span. Of several, each is merged by itself: a video's tokens are ranked among, and
    merged into, its own, so it keeps the share it would keep alone and no video is averaged into another.
    """

    inner: InnerMerging
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @staticmethod
    def of(inner: InnerMerging | None, spans: Spans | None, batch: int) -> MergeRequest | None:
        """The request of a call with `batch` samples, or None when it merges nothing. Raises InputError."""
        if inner is None or spans is None:
            return None
        given: Sequence[Any] = spans.tolist() if isinstance(spans, Tensor) else spans
        samples = [[sample] if sample and isinstance(sample[0], int) else sample for sample in given]
        if len(samples) != batch or any(len(pair) != 2 for pairs in samples for pair in pairs):
            raise InputError(f"visual_spans must be {batch} pairs (start, length), one for each sample, not {given}")
        if any(number < 0 for pairs in samples for pair in pairs for number in pair):
            raise InputError(f"visual_spans must hold no negative start or length, not {given}")
        request = MergeRequest(inner, tuple(tuple((int(s), int(n)) for s, n in sorted(pairs)) for pairs in samples))
        return request if any(request.removed) else None

    @property
    def removed(self) -> tuple[int, ...]:
        """How many tokens each sample loses."""
        return tuple(sum(self.inner.removed(length) for _, length in pairs) for pairs in self.spans)

    def pruned_width(self, mask: Tensor) -> int:
        """Tokens of the longest sample after merging, given the prefill's mask [B, N] (nonzero: visible).

        Raises InputError when padding is not on the left, or a span is not among the visible tokens.
        """
        shown = mask.bool()
        counts, firsts = torch.stack([shown.sum(1), shown.int().argmax(1)]).tolist()
        return self._width(mask.shape[1], counts, firsts)

    def unpadded_width(self, tokens: int) -> int:
        """As `pruned_width`, where nothing is padded: no mask, for whose values the host would wait for the device."""
        return self._width(tokens, [tokens] * len(self.spans), [0] * len(self.spans))

    def _width(self, tokens: int, counts: Sequence[int], firsts: Sequence[int]) -> int:
        """For each sample, how many of its N tokens are visible, and the column of the first of them."""
        for sample, (count, first, pairs) in enumerate(zip(counts, firsts, self.spans, strict=True)):
            if count == 0 or first + count != tokens:
                raise InputError(
                    f"the attention mask of sample {sample} hides all tokens, or one after a visible one: "
                    "with inner merging prompts must be padded on the left"
                )
            for start, length in pairs:
                if length and (start < first or start + length > tokens):
                    raise InputError(
                        f"the visual span of sample {sample}, {length} tokens from {start}, must lie within its "
                        f"visible tokens {first}..{tokens - 1}, behind other spans, and the whole prompt in one prefill"
                    )
                first = max(first, start + length)
        return max(count - removed for count, removed in zip(counts, self.removed, strict=True))

    def pruned_mask(self, mask: Tensor, width: int) -> Tensor:
        """The mask [B, M] of all tokens so far -> that of the tokens left by merging, [B, width] bool, padded left.

        What lies between visual tokens is visible, so it makes no difference which columns go: here those that end
        with the last span.
        """
        removed = torch.tensor(self.removed, device=mask.device)[:, None]
        ends = [max((start + length for start, length in pairs), default=0) for pairs in self.spans]
        first = torch.tensor(ends, device=mask.device)[:, None] - removed
        column = torch.arange(width, device=mask.device) + (mask.shape[1] - width) - removed  # without them, [B, width]
        source = torch.where(column < first, column, column + removed)
        return mask.bool().gather(1, source.clamp(min=0)) & (column >= 0)

    def merge(self, hidden: Tensor, score: Tensor | None, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Merge hidden [B, N, D] with positions [B, N] -> [B, width, D], [B, width], padded on the left.

        score [B, N], which the method `attention` needs. Every sample is merged by itself, as if it were alone.
        """
        rows, places = [], []
        for sample, pairs in enumerate(self.spans):
            row, ratio = hidden[sample : sample + 1], self.inner.ratio
            kept = torch.arange(hidden.shape[1], device=hidden.device)
            for start, length in reversed(pairs):  # from the back, so that columns before a span stay what they were
                if score is None:
                    row, left = merge_tokens_dpc_knn(row, start=start, length=length, ratio=ratio)
                else:
                    row, left = merge_tokens(row, score[sample, kept], start=start, length=length, ratio=ratio)
                kept = kept[left]
            shift = width - len(kept)  # negative: columns of padding go
            rows.append(pad(row, (0, 0, shift, 0)))
            places.append(pad(positions[sample, kept], (shift, 0)))
        return torch.cat(rows), torch.stack(places)


def check_lengths(lengths: Sequence[int], request: MergeRequest | None) -> None:
    """Raise InputError unless a cache with these lengths at its layers can stem from earlier steps of this request."""
    if lengths[0] == 0:
        return
    k = len(lengths) if request is None else request.inner.layer
    below, above = set(lengths[:k]), set(lengths[k:])
    if len(below) > 1 or len(above) > 1:
        raise InputError(
            f"the cache holds {list(lengths)} tokens at its layers, as inner merging with other settings leaves it: "
            "pass the same inner and visual_spans to every step"
        )
    if request is not None and lengths[0] - lengths[k] < min(request.removed):
        raise InputError(
            f"the cache holds {list(lengths)} tokens at its layers, as if nothing had been merged: inner merging must "
            "start with the prefill, and the whole prompt in one prefill"
        )


def _splice(hidden: Tensor, tokens: Tensor, kept: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Put tokens [n, D], which stay at kept [n] of the span, in the span's place."""
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    stop = start + length
    return (
        torch.cat([hidden[:, :start], tokens[None], hidden[:, stop:]], dim=1),
        torch.cat([columns[:start], kept + start, columns[stop:]]),
    )


def _check(hidden: Tensor, start: int, length: int) -> None:
    if hidden.ndim != 3 or hidden.shape[0] != 1:
        raise InputError(f"hidden has shape {tuple(hidden.shape)}, it must be [1, N, D]")
    if start < 0 or length < 0 or start + length > hidden.shape[1]:
        raise InputError(f"a visual span of {length} tokens from {start} does not fit into {hidden.shape[1]} tokens")
