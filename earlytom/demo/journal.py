"""Answers kept in a file as they come, so that an evaluation that was interrupted goes on where it stood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import journal
from .evaluate import ClipAnswers
from .report import Given


class Journal(journal.Journal[ClipAnswers]):
    """What is evaluated (`key`), then one line for each row and clip. Raises ConfigError."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__(path, key, of="evaluation", holds="answers", write=_written, read=_read)


def _written(answer: ClipAnswers) -> dict[str, Any]:
    given = [[given.text, list(given.ids), given.right] for given in answer.given]
    return {"row": answer.row, "budgets": list(answer.budgets), "clip": answer.clip, "tokens": answer.tokens,
            "seconds": answer.seconds, "given": given}


def _read(line: dict[str, Any]) -> ClipAnswers:
    given = tuple(Given(text, tuple(ids), right) for text, ids, right in line.pop("given"))
    return ClipAnswers(budgets=tuple(line.pop("budgets")), given=given, **line)
