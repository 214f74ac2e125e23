"""Results kept in a file as they come, so that work that was interrupted goes on where it stood."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import ConfigError

Result = TypeVar("Result")


class Journal(Generic[Result]):
    """A file of JSON lines: what the results are of (`key`, under the name `of`), then one line for each.

    of, holds: for people, such as "evaluation" and "answers"; write, read: a result as a JSON object, and back: read
    raises ValueError, TypeError or KeyError for what is none. done: the results that the file holds already. Raises
    ConfigError when it is of other work, no journal, or cannot be written. A line that was cut off, by a crash or a
    full disk, does not count.
    """

    def __init__(
        self, path: Path, key: str, *, of: str, holds: str, write: Callable[[Result], dict[str, Any]],
        read: Callable[[dict[str, Any]], Result],
    ) -> None:
        self.path, self.holds, self._write = path, holds, write
        self.done: list[Result] = []
        try:
            if not path.exists() or not path.stat().st_size:
                self._append([json.dumps({of: key})])
                return
            first, *lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"the file of {holds} {path} cannot be used: {error.strerror}") from None
        try:
            known = json.loads(first)[of]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path} is no file of {holds}: give one that is not there yet") from None
        if known != key:
            raise ConfigError(f"{path} holds {holds} of another {of}: give another file, or remove it")
        for line in lines:
            try:
                self.done.append(read(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                continue
        if lines and lines[-1]:
            self._append([""])  # ends the line that was cut off

    def add(self, results: Sequence[Result]) -> None:
        self._append([json.dumps(self._write(result)) for result in results])

    def _append(self, lines: Sequence[str]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"the file of {self.holds} {self.path} cannot be written: {error.strerror}") from None
