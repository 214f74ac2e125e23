"""Answers kept in a file as they come, so that an evaluation that was interrupted goes on where it stood."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from .evaluate import ClipAnswers
from .report import Given


class Journal:
    """A file of JSON lines: what is evaluated (`key`), then one line for each row and clip.

    done: the answers that it holds already. Raises ConfigError when it is of another evaluation, no journal, or cannot
    be written. A line that was cut off, by a crash or a full disk, is asked again.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.done: list[ClipAnswers] = []
        try:
            if not path.exists() or not path.stat().st_size:
                self._append([json.dumps({"evaluation": key})])
                return
            first, *lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"the file of answers {path} cannot be used: {error.strerror}") from None
        try:
            known = json.loads(first)["evaluation"]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path} is no file of answers: give one that is not there yet") from None
        if known != key:
            raise ConfigError(f"{path} holds answers of another evaluation: give another file, or remove it")
        for line in lines:
            try:
                self.done.append(_read(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                continue
        if lines and lines[-1]:
            self._append([""])  # ends the line that was cut off

    def add(self, answers: Sequence[ClipAnswers]) -> None:
        self._append([json.dumps(_written(answer)) for answer in answers])

    def _append(self, lines: Sequence[str]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"the file of answers {self.path} cannot be written: {error.strerror}") from None


def _written(answer: ClipAnswers) -> dict[str, object]:
    given = [[given.text, list(given.ids), given.right] for given in answer.given]
    return {"row": answer.row, "budgets": list(answer.budgets), "clip": answer.clip, "tokens": answer.tokens,
            "seconds": answer.seconds, "given": given}


def _read(line: dict[str, object]) -> ClipAnswers:
    given = tuple(Given(text, tuple(ids), right) for text, ids, right in line.pop("given"))  # type: ignore[attr-defined]
    return ClipAnswers(budgets=tuple(line.pop("budgets")), given=given, **line)  # type: ignore[arg-type]
