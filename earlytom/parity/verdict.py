"""The verdict on a comparison: its numbers held against the tolerances of a dtype, and where a failure begins."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import InnerMerging
from .answers import AnswerAgreement
from .intermediates import OUTPUTS, Intermediate
from .results import Difference, Flip, Hop, PlanAgreement


@dataclass(frozen=True)
class Tolerance:
    """What a dtype must hold, every limit included.

    tokens: largest absolute error, times the tokens' rms where that is above 1 (None: the cosine decides); cosine and
    worst_cosine: of tokens; similarity: absolute; received, hidden: relative (norms); weights: absolute; patches: least
    share of equal patches in frames whose plan agrees; exact: all choices must be equal but for ties that float32 does
    not resolve, else but for near-ties. logits: error that may explain another answer, over their
    standard deviation, see `logits_limit`.
    """

    tokens: float | None
    cosine: float
    worst_cosine: float
    similarity: float
    received: float
    hidden: float
    weights: float
    patches: float
    exact: bool
    logits: float


# The limits on tokens and plans are what a bundle promises (docs/parity.md); those on scores are set so that an error
# which would excuse a wrong choice fails by itself. bf16 has 8 bits of mantissa where fp16 has 11.
TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(1e-4, 0.99999, 0.9999, 1e-5, 1e-4, 1e-4, 1e-4, patches=1.0, exact=True, logits=1e-3),
    "fp16": Tolerance(None, 0.999, 0.99, 5e-3, 2e-2, 4.5e-2, 1e-2, patches=0.99, exact=False, logits=1e-1),
    "bf16": Tolerance(None, 0.99, 0.93, 2e-2, 1e-1, 1.4e-1, 5e-2, patches=0.95, exact=False, logits=3e-1),
}


# Merging inside the LLM ranks tokens too. A near-tie there exchanges a visual token, in any dtype, which moves logits
# by up to a tenth of their standard deviation (measured with the demo; relative errors of 5e-6 in the tokens do it).
SWAPPED = 0.1


@dataclass(frozen=True)
class Verdict:
    """passed, or the reasons why not, each one sentence; bisect: where a failed hop first goes wrong."""

    passed: bool
    reasons: tuple[str, ...]
    bisect: str | None = None


def judge(hop: Hop) -> Verdict:
    """Hold the numbers of `hop` against the tolerances of its dtype; a failure says where it first goes wrong."""
    limit = TOLERANCES[hop.dtype]
    reasons = [text for name, difference in hop.differences.items() for text in _complaints(name, difference, limit)]
    if not hop.differences["tokens"].count:
        reasons.insert(0, "no token could be compared: the plans agree nowhere")
    plan = hop.plan
    wrong = _wrong_flips(plan, limit)
    if wrong:
        first, margin = wrong[0], "unknown" if wrong[0].margin is None else f"{wrong[0].margin:.2e}"
        allowed = "ties" if limit.exact else "near-ties"
        reasons.append(
            f"{len(wrong)} of {len(plan.flips)} choices that differ are no {allowed}, the first {first.where}, frame "
            f"{first.frame}: {first.what} (margin {margin}, error of its score {first.error:.2e})"
        )
    if not plan.flips and min(plan.shares) < 1:
        reasons.append(f"the plans differ and no choice explains it: {plan.shares._asdict()}")
    tied = limit.exact and not wrong
    if plan.shares.comparable_patches < limit.patches and not tied:
        equal = f"{plan.comparable_equal} of {plan.comparable} patches"
        reasons.append(f"only {equal} ({plan.shares.comparable_patches:.2%}) are equal, {limit.patches:.0%} must be")
    return Verdict(not reasons, tuple(reasons), bisect(hop) if reasons else None)


def logits_limit(dtype: str, inner: InnerMerging | None) -> float:
    """The error of a logit that is allowed to a hop of this dtype, over the standard deviation of the logits."""
    return TOLERANCES[dtype].logits + (SWAPPED if inner is not None else 0.0)


def judge_answers(answers: AnswerAgreement) -> tuple[str, ...]:
    """Why the answers fail a hop, one sentence: one of them differs, and is no near-tie."""
    wrong = [divergence for divergence in answers.divergences if not divergence.explained]
    if not wrong:
        return ()
    first = wrong[0]
    return (
        f"{len(wrong)} of {answers.questions} answers differ and no near-tie explains it, the first that to "
        f"{first.question!r}: {first.actual!r} in place of {first.reference!r} at token {first.index} (margin "
        f"{first.margin:.2e}, error of the logits {first.error:.2e}, allowed {first.allowed:.2e})",
    )


def parting(plan: PlanAgreement, dtype: str) -> str:
    """What makes two plans leave other frames, or mark them otherwise, where nobody is to blame: else empty.

    Patches do not count: another one beside hundreds is an error of the tokens like others.
    """
    wrong = _wrong_flips(plan, TOLERANCES[dtype])
    flips = [flip for flip in plan.flips if flip.kind not in ("patch", "contextual")]
    if not flips or any(flip in wrong for flip in flips):
        return ""
    first = flips[0]
    return f"{first.where}, {first.what} (margin {first.margin:.1e})"


def bisect(hop: Hop) -> str | None:
    """The first intermediate out of tolerance and the layers between it and the last good one; None without any."""
    limit = TOLERANCES[hop.dtype]
    wrong_layers = {flip.layer for flip in _wrong_flips(hop.plan, limit)}
    start, good = 0, None  # the first layer since what was last seen to be good
    for name, found in hop.differences.items():
        if name in OUTPUTS:
            continue
        kind, layer = Intermediate.from_text(name)
        if _complaints(name, found, limit) or (kind == "weights" and layer in wrong_layers):
            if kind == "weights":
                where = f"the plan of merge layer {layer}"
            elif kind == "received":
                where = f"the attention of layer {start - 1}"
            elif layer is None:
                where = "the similarity of the frames left"
            else:
                where = f"encoder layers {start} to {layer}" if start < layer else f"encoder layer {layer}"
            before = f"{good} is within it" if good else "nothing before it can be seen"
            return f"{name} is the first out of tolerance: {where}; {before}"
        good = name
        if kind == "hidden" and layer is not None:
            start = layer + 1
    return good and f"{good} and all before it are within tolerance: layers {start} on, selection or projector"


def _wrong_flips(plan: PlanAgreement, limit: Tolerance) -> list[Flip]:
    return [flip for flip in plan.flips if not (flip.tied if limit.exact else flip.excused)]


def _complaints(name: str, found: Difference, limit: Tolerance) -> list[str]:
    if not found.finite:
        return [f"{name} has {found.nans} NaN and {found.infs} infinite values"]
    if not found.count:
        return []
    kind = Intermediate.from_text(name).kind
    checks: list[tuple[str, float, float | None]] = []
    if kind in ("tokens", "newlines"):
        scale = max(1.0, found.rms)
        checks.append(("a largest error of", found.max_abs, limit.tokens and limit.tokens * scale))
        checks.append(("a cosine distance of", 1 - found.cosine, 1 - limit.cosine))
        checks.append(("a token at a cosine distance of", 1 - found.worst_cosine, 1 - limit.worst_cosine))
    elif kind in ("similarity", "weights"):
        checks.append(("a largest error of", found.max_abs, getattr(limit, kind)))
    else:
        checks.append(("a relative error of", found.relative, getattr(limit, kind)))
    return [
        f"{name} has {what} {value:.2e}, at most {most:.2e} is allowed"
        for what, value, most in checks
        if most is not None and not value <= most
    ]
