"""Numbers of a comparison between two backends: `compare` and `measure` count and never judge (see verdict.py).

Numbers are compared where the plans agree (see agreement.py), because a near-tie may flip a choice between two right
backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..config import EarlyTomConfig
from ..errors import InputError
from ..shapes import StaticShapes
from .agreement import Agreement, ScoreErrors, agree, combine
from .intermediates import Intermediate
from .results import Difference, Hop, PlanAgreement
from .traces import VideoTrace


def compare(
    expected: Tensor | ArrayLike, actual: Tensor | ArrayLike, mask: Tensor | ArrayLike | None = None
) -> Difference:
    """Difference of two arrays of one shape, computed in float64; mask: bool on the leading axes, what to compare.

    Raises InputError when the shapes differ or the mask does not fit.
    """
    a, b = _array(expected), _array(actual)
    if a.shape != b.shape:
        raise InputError(f"arrays of shape {list(a.shape)} and {list(b.shape)} cannot be compared")
    if mask is not None:
        chosen = _array(mask).astype(bool)
        if chosen.shape != a.shape[: chosen.ndim]:
            raise InputError(f"a mask of shape {list(chosen.shape)} does not fit arrays of shape {list(a.shape)}")
        a, b = a[chosen], b[chosen]
    finite = np.isfinite(a) & np.isfinite(b)
    nans = int((np.isnan(a) | np.isnan(b)).sum())
    infs = int((np.isinf(a) | np.isinf(b)).sum())
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    count = int(finite.sum())
    error = np.abs(a - b)
    signal, noise = float(np.square(a).sum()), float(np.square(error).sum())
    width = a.shape[-1] if a.ndim and a.size else 1
    return Difference(
        count=count,
        max_abs=float(error.max(initial=0.0)),
        mean_abs=float(error.sum() / max(count, 1)),
        relative=_ratio(math.sqrt(noise), math.sqrt(signal)),
        cosine=float(_cosines(a.reshape(1, -1), b.reshape(1, -1))[0]),
        worst_cosine=float(_cosines(a.reshape(-1, width), b.reshape(-1, width)).min(initial=1.0)),
        sqnr_db=math.inf if not noise else (10 * math.log10(signal / noise) if signal else -math.inf),
        rms=math.sqrt(signal / max(count, 1)),
        nans=nans,
        infs=infs,
    )


class Aligned(NamedTuple):
    """Values of two backends, the reference's first, where their plans agree: name -> [rows, width] of both."""

    values: dict[str, tuple[Tensor, Tensor]]
    plan: PlanAgreement


def align(
    reference: Sequence[VideoTrace], actual: Sequence[VideoTrace], config: EarlyTomConfig, shapes: StaticShapes, *,
    errors: ScoreErrors | None = None,
) -> Aligned:
    """Two backends on the videos of one call. errors: see `agree`; the names are those of Hop.differences."""
    plans: list[PlanAgreement] = []
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for v, (mine, theirs) in enumerate(zip(reference, actual)):
        agreement = agree(mine, theirs, config, shapes, errors=errors, video=v)
        plans.append(agreement.plan)
        for name, a, b in _comparable(mine, theirs, agreement, config):
            pairs.setdefault(name, []).append((a.flatten(0, -2), b.flatten(0, -2)))
    values = {
        name: (torch.cat([a for a, _ in both]).float(), torch.cat([b for _, b in both]).float())
        for name, both in pairs.items()
    }
    return Aligned(values, combine(plans))


def measure(aligned: Aligned, names: tuple[str, str], dtype: str) -> Hop:
    """The numbers of one hop; names: of the reference and the other backend."""
    differences = {name: compare(a, b) for name, (a, b) in aligned.values.items()}
    return Hop(*names, dtype, differences, aligned.plan)


def _comparable(
    mine: VideoTrace, theirs: VideoTrace, agreement: Agreement, config: EarlyTomConfig
) -> list[tuple[str, Tensor, Tensor]]:
    """Names and values of one video, the reference's first, cut to where the plans agree; rows along the last axis."""
    out: list[tuple[str, Tensor, Tensor]] = []

    def add(kind: str, a: Tensor, b: Tensor, layer: int | None = None) -> None:
        out.append((Intermediate(kind, layer).to_text(), a, b))

    if mine.stages and theirs.stages:
        upstream = True
        for k, layer in enumerate(config.merge_layers):
            a, b = mine.stages[k], theirs.stages[k]
            i, j = _columns(agreement.rows[k], 2)
            if upstream:
                add("similarity", a.similarity, b.similarity, layer)
                add("weights", a.weights[i], b.weights[j], layer)
            add("hidden", a.hidden[i], b.hidden[j], layer)
            upstream = upstream and len(i) == len(a.weights) == len(b.weights)
        if upstream and mine.similarity is not None and theirs.similarity is not None:
            add("similarity", mine.similarity, theirs.similarity)
        if mine.received is not None and theirs.received is not None:
            i, j = _columns(agreement.rows[-1], 2)
            add("received", mine.received[i], theirs.received[j])
    i, j = _columns(agreement.rows[-1], 2)
    out.append(("weights", mine.weights[i], theirs.weights[j]))
    rows = agreement.tokens
    empty = mine.tokens[0][:0]
    out.append(
        (
            "tokens",
            torch.stack([mine.tokens[f][at] for f, at, _, _ in rows]) if rows else empty,
            torch.stack([theirs.tokens[f][at] for _, _, f, at in rows]) if rows else empty,
        )
    )
    count = min(len(mine.newlines), len(theirs.newlines))  # grids may differ in how many rows of patches they keep
    if count:
        out.append(("newlines", mine.newlines[:count], theirs.newlines[:count]))
    return out


def _array(values: Tensor | ArrayLike) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values if values.dtype == torch.bool else values.double()).numpy()
    array = np.asarray(values)
    return array if array.dtype == bool else array.astype(np.float64)


def _cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Cosine of each row; 1 of two zeros, 0 of one."""
    lengths = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    product = lengths[0] * lengths[1]
    cosine = (a * b).sum(-1) / np.where(product > 0, product, 1.0)
    return np.where(product > 0, np.clip(cosine, -1, 1), np.where(lengths[0] == lengths[1], 1.0, 0.0))


def _ratio(part: float, whole: float) -> float:
    return 0.0 if not part else (part / whole if whole else math.inf)


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> list[list[int]]:
    return [list(column) for column in zip(*rows)] if rows else [[] for _ in range(count)]
