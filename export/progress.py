"""Stages with elapsed time: a line that updates on a terminal, plain lines in a log, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

STAGES = ("load", "rewrite", "export", "check", "build", "verify")


class Progress:
    """Reports to `stream` (standard error): `with progress.stage("export"): ...`, and `step` within it.

    seconds: what each finished stage took; live: whether `step` shows, which it does on a terminal only.
    """

    def __init__(self, stages: tuple[str, ...] = STAGES, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stages, self.quiet = stages, quiet
        self.stream = sys.stderr if stream is None else stream
        self.seconds: dict[str, float] = {}
        self.live = not quiet and self.stream.isatty()
        self._stage, self._start = "", 0.0
        self._begin = time.perf_counter()

    def say(self, text: str) -> None:
        """One line of its own."""
        if not self.quiet:
            self._clear()
            print(text, file=self.stream, flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage, self._start = name, time.perf_counter()
        self.step("")
        try:
            yield
        except BaseException:
            self._clear()
            raise
        self.seconds[name] = time.perf_counter() - self._start
        self.say(f"{self._bar(done=True)} {name:<8} {self.seconds[name]:6.1f} s")

    def step(self, text: str) -> None:
        """What is happening within the stage."""
        if self.live:
            elapsed = time.perf_counter() - self._begin
            line = f"{self._bar()} {self._stage:<8} {elapsed:6.1f} s  {text}"
            print(f"\r\033[K{line[:110]}", end="", file=self.stream, flush=True)

    def _bar(self, *, done: bool = False) -> str:
        at = self.stages.index(self._stage) + done
        return f"[{'#' * (4 * at)}{'.' * (4 * (len(self.stages) - at))}]"

    def _clear(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=self.stream, flush=True)
