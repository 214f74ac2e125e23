"""What a run measured, always whole on disk, and the time that it has left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlytom.errors import EngineError
from earlytom.files import replacing

SCHEMA = 1
RESERVE = 10.0  # seconds kept for closing, printing and the last write


class Skip(Exception):
    """A step cannot be done here, or not to its end; the text says why, `result` is what it measured before."""

    def __init__(self, why: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(why)
        self.result = result


class OutOfTime(Exception):
    """The budget is spent in the middle of a step."""


@dataclass(frozen=True)
class Step:
    """One measurement. seconds: an estimate, asked for when its turn comes; run: what it measures, as plain JSON."""

    name: str
    what: str
    seconds: Callable[[], float]
    run: Callable[[], dict[str, Any]]


class Journal:
    """The JSON file at `path`: replaced in one move, so that a reader, or the end of power, finds it whole."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"schema": SCHEMA, "finished": False, **head, "steps": [], "summary": {}}
        self._by_name: dict[str, dict[str, Any]] = {}

    @property
    def steps(self) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = self.content["steps"]
        return steps

    def result(self, name: str) -> dict[str, Any] | None:
        """What a step measured, or None when it was not done."""
        entry = self._by_name.get(name)
        return entry["result"] if entry and entry["status"] == "done" else None

    def note(self, step: Step, status: str, *, reason: str = "", seconds: float = 0.0, result: Any = None) -> None:
        """Say how a step stands (running, done, skipped, failed, interrupted), and write."""
        entry = self._by_name.get(step.name)
        if entry is None:
            entry = self._by_name[step.name] = {"name": step.name, "what": step.what}
            self.steps.append(entry)
        entry |= {"status": status, "reason": reason, "seconds": round(seconds, 2), "result": result}
        self.write()

    def write(self) -> None:
        text = json.dumps(self.content, indent=1, allow_nan=False, default=str)
        try:
            with replacing(self.path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise EngineError(f"the results cannot be written to {self.path}: {error.strerror}") from None


class Clock:
    """Time since the start, and what is left of `minutes`."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes
        self.inside = False  # of a step, which may be ended
        self.ended = False  # by a signal

    @property
    def used(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.seconds - min(RESERVE, self.seconds / 10) - self.used

    def check(self, step: str = "") -> None:
        """Raise OutOfTime when nothing is left; called from inside of long work."""
        if self.left <= 0:
            raise OutOfTime(f"the time was up{f' at: {step}' if step else ''}")
