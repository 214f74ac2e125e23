"""What an evaluation found: every answer, and the accuracies and differences that follow. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import InnerMerging
from .questions import Question
from .score import Difference, Share, difference, share
from .suite import Suite


@dataclass(frozen=True)
class Given:
    """One answer: its text and ids, the one that ends it included, and whether it is right."""

    text: str
    ids: tuple[int, ...]
    right: bool


@dataclass(frozen=True)
class RowReport:
    """One row's answers, in the order of the suite's questions. tokens, seconds: means over clips; see evaluate.Row."""

    name: str
    method: str
    retain: float | None
    inner: InnerMerging | None
    budgets: tuple[int, ...]
    tokens: float
    seconds: float
    given: tuple[Given, ...]


@dataclass(frozen=True)
class Report:
    """A suite and every row's answers to it."""

    suite: Suite
    rows: tuple[RowReport, ...]

    def row(self, name: str) -> RowReport:
        return next(row for row in self.rows if row.name == name)

    def accuracy(self, row: RowReport, kind: str | None = None) -> Share:
        """Of the questions of one kind, or of all."""
        return share(given.right for given, take in zip(row.given, self._of(kind)) if take)

    def difference(self, one: RowReport, other: RowReport, kind: str | None = None) -> Difference:
        """Accuracy of `one` less that of `other` on the questions of one kind, or on all."""
        clips = [asked.index for asked in self.suite.asked for _ in asked.questions]
        taken = [
            (a.right, b.right, clip)
            for a, b, clip, take in zip(one.given, other.given, clips, self._of(kind)) if take
        ]
        return difference([a for a, _, _ in taken], [b for _, b, _ in taken], [clip for _, _, clip in taken])

    def comparisons(self) -> list[tuple[RowReport, RowReport]]:
        """Which rows are compared: static and calibrated with released, released with controls, engines with static,
        each with full, always at the same ratio and both with inner merging or without; and inner merging with none."""
        found = []

        def look(method: str, retain: float | None, inner: bool) -> RowReport | None:
            same = [r for r in self.rows if (r.method, r.retain) == (method, retain)]
            return next((r for r in same if bool(r.inner) == inner), None)

        pairs = [("static", "released"), ("calibrated", "released"), ("calibrated", "static"), ("engine", "static"),
                 *(("released", control) for control in CONTROLS)]
        for one, other in pairs:
            for row in self.rows:
                against = look(other, row.retain, bool(row.inner))
                if row.method == one and against is not None:
                    found.append((row, against))
        for row in self.rows:
            full = look("full", None, bool(row.inner))
            if full is not None and row.method != "full":
                found.append((row, full))
        for row in self.rows:
            plain = look(row.method, row.retain, False)
            if row.inner and plain is not None and row.method not in ("", "engine"):
                found.append((row, plain))
        return found

    def _of(self, kind: str | None) -> list[bool]:
        return [kind is None or question.kind == kind for question in self.suite.questions]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the suite, every question, every row with its accuracies and answers, every comparison."""
        kinds = (None, *self.suite.kinds)
        return {
            "suite": {"name": "demo", "split": self.suite.split, "seed": self.suite.seed, "form": self.suite.form,
                      "frames": self.suite.frames, "clips": len(self.suite.asked)},
            "questions": [
                {"clip": asked.index, "kind": question.kind, "form": "choice" if question.options else "open",
                 "held_out": question.held_out, "prompt": question.prompt, "answer": question.answer}
                for asked in self.suite.asked for question in asked.questions
            ],
            "rows": [
                {"name": row.name, "method": row.method, "retain": row.retain,
                 "inner": None if row.inner is None else vars(row.inner), "budgets": list(row.budgets),
                 "tokens": row.tokens, "tower_seconds": row.seconds,
                 "accuracy": {kind or "all": vars(self.accuracy(row, kind)) for kind in kinds},
                 "answers": [{"text": given.text, "ids": list(given.ids), "right": given.right} for given in row.given]}
                for row in self.rows
            ],
            "differences": [
                {"row": one.name, "against": other.name,
                 "difference": {kind or "all": vars(self.difference(one, other, kind)) for kind in kinds}}
                for one, other in self.comparisons()
            ],
        }


CONTROLS = ("uniform", "random", "first")
METHODS = ("full", "released", "static", "calibrated", *CONTROLS)


def right(text: str, question: Question) -> bool:
    """Whether an answer is the right one, word for word; case and outer blanks do not count."""
    return text.strip().casefold() == question.answer.strip().casefold()
