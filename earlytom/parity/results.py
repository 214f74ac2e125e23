"""What a comparison found, as plain data: frozen dataclasses, and the JSON that a manifest keeps of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from ..errors import InputError
from .answers import AnswerAgreement
from .intermediates import computed_at
from .reading import read, read_list

ROUNDING = 2.0**-22  # what float32 does not resolve of a score, relative to it: two units in the last place of 1
STATES = ("passed", "failed", "not run")


@dataclass(frozen=True)
class Difference:
    """How far `actual` is from `expected`, over `count` values.

    max_abs, mean_abs: in the unit of the values; relative: norm of the difference over norm of the expected; cosine: of
    both as one vector; worst_cosine: the smallest of any row along the last axis (of a token, of a patch); sqnr_db:
    energy of the expected over energy of the difference, infinite when nothing differs; rms: of the expected, the scale
    of the values. nans and infs are those of either side; the other numbers leave these values out.
    """

    count: int
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    worst_cosine: float
    sqnr_db: float
    rms: float
    nans: int = 0
    infs: int = 0

    @property
    def finite(self) -> bool:
        return self.nans == self.infs == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: a number that is not finite is null."""
        return {name: x if math.isfinite(x) else None for name, x in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> Difference:
        """What `to_dict` gave: null is infinity, in decibels negative where nothing was expected but zeros."""
        found = read(cls, values)
        return replace(found, sqnr_db=-math.inf) if math.isinf(found.relative) else found


@dataclass(frozen=True)
class Flip:
    """One choice that differs.

    kind: "cut" (a segment starts at `frame` or not), "merge" (`frame` is merged with the next one or not), "rank"
    (which frame the budget removes), "frames" (one of these, the backend does not show which), "patch", "contextual"
    (which patches a frame keeps), "plan" (not what the rules make of the backend's own scores). layer: the merge layer,
    None after the last one; frame: among those that enter it, or among those left; margin: distance of the deciding
    score to the alternative in the reference, None when it is not known; error: largest difference of that score
    between the two backends; what: for people; rounding: margins up to it are none in float32.
    """

    kind: str
    video: int
    layer: int | None
    frame: int
    margin: float | None
    error: float
    what: str
    rounding: float = ROUNDING

    @property
    def where(self) -> str:
        """The place of the choice, for people."""
        return "after the last merge layer" if self.layer is None else f"at merge layer {self.layer}"

    @property
    def tied(self) -> bool:
        """Whether the scores are equal as far as float32 goes: two copies of one frame, say. No backend is to blame."""
        return self.margin is not None and self.margin <= self.rounding

    @property
    def excused(self) -> bool:
        """Whether the choice was closer than its score is exact: a near-tie."""
        return self.margin is not None and self.margin <= max(self.error, self.rounding) < math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: an error that is not finite is null."""
        error = self.error if math.isfinite(self.error) else None
        return asdict(self) | {"error": error, "excused": self.excused, "tied": self.tied}

    @classmethod
    def from_dict(cls, values: Any) -> Flip:
        return read(cls, values, derived=("excused", "tied"))


class Shares(NamedTuple):
    """How much of two plans agrees, 0..1: of frames, of marks, of patches, of patches in comparable frames."""

    frames: float
    dynamic: float
    patches: float
    comparable_patches: float


@dataclass(frozen=True)
class PlanAgreement:
    """How far two plans agree.

    frames_equal of `frames` left are the same mix of source frames, dynamic_equal of those have the same mark;
    patches_equal of `patches` are kept by both; comparable_equal of `comparable` counts only frames with the same mix
    and mark, where choosing patches was the same task. first_layer: the first merge layer whose plan differs;
    flips_total, flips_excused: how many flips there are and how many near-ties, those that `worst` leaves out included.
    """

    frames: int
    frames_equal: int
    dynamic_equal: int
    patches: int
    patches_equal: int
    comparable: int
    comparable_equal: int
    first_layer: int | None
    flips: tuple[Flip, ...]
    flips_total: int = -1
    flips_excused: int = -1

    def __post_init__(self) -> None:
        if self.flips_total < 0:
            object.__setattr__(self, "flips_total", len(self.flips))
            object.__setattr__(self, "flips_excused", sum(flip.excused for flip in self.flips))

    @property
    def shares(self) -> Shares:
        """1 of nothing."""
        parts = (self.frames_equal, self.dynamic_equal, self.patches_equal, self.comparable_equal)
        wholes = (self.frames, self.frames_equal, self.patches, self.comparable)
        return Shares(*(part / whole if whole else 1.0 for part, whole in zip(parts, wholes)))

    def worst(self, count: int = 40) -> PlanAgreement:
        """The same with the `count` least excusable flips: what is written down."""
        ranked = sorted(self.flips, key=lambda f: -math.inf if f.margin is None else f.error - f.margin)
        return replace(self, flips=tuple(ranked[:count]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"shares": self.shares._asdict(), "flips": [flip.to_dict() for flip in self.flips]}

    @classmethod
    def from_dict(cls, values: Any) -> PlanAgreement:
        flips = tuple(Flip.from_dict(flip) for flip in read_list(values, "flips"))
        return read(cls, values, derived=("shares",), flips=flips)


@dataclass(frozen=True)
class Hop:
    """The numbers of one comparison: `actual` against `reference`, both names of backends.

    dtype: the row of TOLERANCES that applies; differences: name -> Difference where the plans agree: "tokens",
    "newlines", "weights" and, when both backends show them, those of the intermediates, in the order of computation.
    """

    reference: str
    actual: str
    dtype: str
    differences: Mapping[str, Difference]
    plan: PlanAgreement


@dataclass(frozen=True)
class HopReport:
    """One hop of the ladder: what was compared, its numbers and the verdict.

    status: "passed", "failed" or "not run"; reasons: why it is not "passed"; numbers: None when it did not run;
    polygraphy: its comparator's metrics of each output; note: what to know when reading the numbers; repeat: the
    command that runs the hop by hand, in the bundle's directory, on the saved tensors; answers: of the language model
    to both sides' visual tokens, None when it was not asked; unasked: why not, where it was to be.
    """

    reference: str
    actual: str
    dtype: str
    status: str
    reasons: tuple[str, ...] = ()
    bisect: str | None = None
    numbers: Hop | None = None
    polygraphy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""
    repeat: str = ""
    answers: AnswerAgreement | None = None
    unasked: str = ""

    @property
    def name(self) -> str:
        return f"{self.reference} → {self.actual}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as a manifest keeps it."""
        names = ("name", "reference", "actual", "dtype", "status", "bisect", "note", "repeat")
        out: dict[str, Any] = {name: getattr(self, name) for name in names}
        out["reasons"] = list(self.reasons)
        if self.answers is not None:
            out["answers"] = self.answers.to_dict()
        if self.unasked:
            out["unasked"] = self.unasked
        if self.numbers is not None:
            out["differences"] = {name: d.to_dict() for name, d in self.numbers.differences.items()}
            out["plan"] = self.numbers.plan.to_dict()
            out["polygraphy"] = {name: dict(metrics) for name, metrics in self.polygraphy.items()}
        return out

    @classmethod
    def from_dict(cls, values: Any) -> HopReport:
        """What `to_dict` gave. Raises InputError, naming what is missing, unknown or of another type."""
        reasons = tuple(read_list(values, "reasons"))
        ran = "plan" in values
        report = read(
            cls, values, derived=("name", "differences", "plan", "polygraphy") if ran else ("name",), reasons=reasons,
            numbers=None, polygraphy={}, answers=None, unasked="",
        )
        if report.status not in STATES or not all(isinstance(reason, str) for reason in reasons):
            raise InputError(f"the hop {report.name} is {report.status!r} for the reasons {reasons}")
        # Neither key is there where nothing was to be asked, as in all manifests of versions that could not ask.
        answers = AnswerAgreement.from_dict(values["answers"]) if "answers" in values else None
        unasked = values.get("unasked", "")
        if type(unasked) is not str or (unasked and answers):
            raise InputError(f"the hop {report.name} was not asked for the reason {unasked!r:.60}")
        report = replace(report, answers=answers, unasked=unasked)
        if not ran:
            return report
        differences, polygraphy = values["differences"], values["polygraphy"]
        if not isinstance(differences, dict) or not isinstance(polygraphy, dict) or "tokens" not in differences:
            raise InputError(f"the hop {report.name} lacks the differences of its tokens")
        try:
            names = sorted(differences, key=computed_at)  # a manifest's keys are in alphabetical order
        except ValueError as error:
            raise InputError(f"the hop {report.name} has differences of what no tower computes: {error}") from None
        numbers = Hop(
            report.reference, report.actual, report.dtype,
            {name: Difference.from_dict(differences[name]) for name in names}, PlanAgreement.from_dict(values["plan"]),
        )
        return replace(report, numbers=numbers, polygraphy=polygraphy)


@dataclass(frozen=True)
class ParityReport:
    """All hops of one bundle on one clip."""

    hops: tuple[HopReport, ...]

    @property
    def passed(self) -> bool:
        """Whether hops ran and none failed; a hop that could not run is no failure, see `complete`."""
        states = {hop.status for hop in self.hops}
        return "passed" in states and "failed" not in states

    @property
    def complete(self) -> bool:
        """Whether every hop ran, and its questions where it was to have any."""
        return all(hop.status != "not run" and not hop.unasked for hop in self.hops)

    @property
    def reason(self) -> str:
        """Why it did not pass, one sentence; empty when it did."""
        wrong = [hop for hop in self.hops if hop.status == "failed"] or list(self.hops)
        return "" if self.passed else f"{wrong[0].name} {wrong[0].status}: {wrong[0].reasons[0]}"
