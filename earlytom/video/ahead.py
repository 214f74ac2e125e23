"""Reading many videos in processes of their own, ahead of whoever takes their frames, and never far ahead.

Processes rather than threads: FFmpeg's logging, which tells of damage, is one switch for a process, and a file that
brings FFmpeg down takes only its own reader with it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..errors import VideoError
from .reader import VideoFrames, read_frames


def read_ahead(
    paths: Sequence[Path], *, frames: int, size: int, strict: bool = False, workers: int = 2
) -> Generator[VideoFrames | VideoError, None, None]:
    """What `read_frames` makes of each path, in order: its frames, or the error that it raises.

    workers: processes, each with one video that is being read or waits to be taken; 0 reads here, when asked. Close the
    generator to end them early.
    """
    settings = {"frames": frames, "size": size, "strict": strict}
    if not workers:
        yield from (_read(path, settings) for path in paths)
        return
    crew: list[_Reader] = []
    try:
        for path in paths[:workers]:
            crew.append(_Reader(settings))
            crew[-1].ask(path)
        for i, path in enumerate(paths):
            reader = crew[i % len(crew)]
            found = reader.answer(path)
            if i + len(crew) < len(paths):
                reader.ask(paths[i + len(crew)])
            yield found
    finally:
        for reader in crew:
            reader.end()


def _read(path: Path, settings: dict[str, Any]) -> VideoFrames | VideoError:
    try:
        return read_frames(path, **settings)
    except VideoError as error:
        return error


class _Reader:
    """A process that reads one video at a time; one that dies is replaced when it is asked again."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._process: Any = None
        self._pipe: Connection

    def ask(self, path: Path) -> None:
        if self._process is not None and not self._process.is_alive():
            self.end()
        if self._process is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._settings), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send(path)
        except OSError:  # it died: `answer` says so
            pass

    def answer(self, path: Path) -> VideoFrames | VideoError:
        try:
            found: VideoFrames | VideoError = self._pipe.recv()
            return found
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.end()
            return VideoError(f"{path}: the process that read it died (exit status {code})")

    def end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection, settings: dict[str, Any]) -> None:
    """Read what is asked for until the asker goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the asker's, who ends this process
    try:
        while True:
            pipe.send(_read(pipe.recv(), settings))
    except (EOFError, OSError):
        pass
