"""Whether two backends' visual tokens give the same answers, as plain data; asking.py finds it out.

Greedy decoding is a chain of choices, each the largest of a vocabulary of logits. Two answers part at the first choice
that differs; behind it each side goes on from its own words, so only the tokens before it, the common run, and that
one choice can be compared.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import InputError
from .reading import read, read_list


@dataclass(frozen=True)
class Divergence:
    """One question that two backends answer differently, and the first token that differs.

    clip: number of the clip that it is about; common: text of both answers before token `index`; reference, actual: the
    texts of the two tokens there. The rest is of the logits at that place, to which both sides came by the same tokens:
    margin: the reference's logit of its own token less that of the other's; error: largest difference of a logit
    between the two sides; allowed: the error that their dtype may make. Not finite: infinite. parting: the tie at which
    the two plans of the clip part, where they do: then the answers are about other frames. Else empty.
    """

    question: str
    clip: int
    index: int
    common: str
    reference: str
    actual: str
    margin: float
    error: float
    allowed: float
    parting: str = ""

    @property
    def explained(self) -> bool:
        """Whether it is a near-tie, of the plans or of the two tokens: an error that the dtype may make exchanges them.

        The error that is seen cannot be the bound alone: each side chose its own largest logit, so margin <= 2 * error
        holds for any two answers, and visual tokens that are plainly wrong would explain everything.
        """
        near = self.margin <= 2 * min(self.error, self.allowed)
        return math.isfinite(self.error) and (near or bool(self.parting))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: a number that is not finite is null; no parting is no key, as in manifests that know of none."""
        out = _plain(self) | {"explained": self.explained}
        return out if self.parting else {name: value for name, value in out.items() if name != "parting"}

    @classmethod
    def from_dict(cls, values: Any) -> Divergence:
        """What `to_dict` gave: null is infinity. Raises InputError."""
        parting = values.get("parting", "") if isinstance(values, dict) else ""
        if type(parting) is not str:
            raise InputError(f"the plans of a clip part at {parting!r:.60}, it must be said in words")
        return read(cls, values, derived=("explained",), parting=parting)


@dataclass(frozen=True)
class AnswerAgreement:
    """How far the language model's greedy answers to two backends' visual tokens agree.

    equal of `questions` were answered with the same tokens; of all `tokens` in the reference's answers, `common` come
    before the first that differs in their answer. error: largest difference of a logit, and closest: smallest margin of
    the reference's choice over any other token, at all places that both sides reached by the same tokens: while twice
    the one is less than the other, no answer can differ. Neither is of clips whose plans part at a tie. divergences:
    one for each question that is not equal, the hardest to explain first; explained: how many of them are, those that
    `worst` leaves out included.
    """

    questions: int
    equal: int
    tokens: int
    common: int
    error: float
    closest: float
    divergences: tuple[Divergence, ...] = ()
    explained: int = -1

    def __post_init__(self) -> None:
        if self.explained < 0:
            object.__setattr__(self, "explained", sum(divergence.explained for divergence in self.divergences))
        rising = (0, self.explained, self.differing, self.questions, self.tokens)
        unlisted = self.differing - len(self.divergences)
        if list(rising) != sorted(rising) or not 0 <= self.common <= self.tokens or not 0 <= unlisted <= self.explained:
            raise InputError(
                f"{self.equal} of {self.questions} answers and {self.common} of {self.tokens} tokens cannot be equal "
                f"where {len(self.divergences)} answers are listed as different and {self.explained} explained"
            )

    @property
    def differing(self) -> int:
        return self.questions - self.equal

    def worst(self, count: int = 40) -> AnswerAgreement:
        """The same with `count` divergences, or all that are not explained: what is written down."""
        return replace(self, divergences=self.divergences[: max(count, self.differing - self.explained)])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return _plain(self) | {"divergences": [divergence.to_dict() for divergence in self.divergences]}

    @classmethod
    def from_dict(cls, values: Any) -> AnswerAgreement:
        """What `to_dict` gave. Raises InputError, naming what is missing, unknown, of another type or impossible."""
        return read(cls, values, divergences=tuple(map(Divergence.from_dict, read_list(values, "divergences"))))


def _plain(found: Divergence | AnswerAgreement) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(found).items()}
