"""What FFmpeg itself marks as damaged in a file, counted, so that concealed errors do not pass without a word.

FFmpeg marks packets that were cut off and frames that it had to conceal. Some demuxers (Matroska) and decoders (MJPEG)
mark nothing and only log: those lines are read as well, of the calling thread alone. What a threaded decoder logs comes
from its own threads, cannot be told from another file's, and is left out; most of such decoders mark their frames, some
a moment too late to be seen, so that the counts are lower bounds. Damage that still decodes without an error (a flipped
bit in VP9, HEVC or AV1, say) is marked by nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from .source import import_av


@dataclass(frozen=True)
class Damage:
    """Counts over all packets of a file and the frames that were decoded; false when there is nothing to report.

    Attributes:
        packets: corrupt packets: cut off, or lost on the way.
        missing: packets that the container's header counts and the file lacks.
        frames: decoded frames that FFmpeg marks as corrupt or concealed.
        errors: places at which the demuxer or the decoder logged an error.
        message: the first line that was logged, for people.
    """

    packets: int = 0
    missing: int = 0
    frames: int = 0
    errors: int = 0
    message: str = ""

    def __bool__(self) -> bool:
        return self.packets + self.missing + self.frames + self.errors > 0

    def __add__(self, other: Damage) -> Damage:
        return Damage(
            self.packets + other.packets,
            self.missing + other.missing,
            self.frames + other.frames,
            self.errors + other.errors,
            self.message or other.message,
        )

    def __str__(self) -> str:
        named = (
            (self.packets, "corrupt packet"),
            (self.missing, "missing packet"),
            (self.frames, "corrupt frame"),
            (self.errors, "error"),
        )
        said = [f"{count} {name}{'s' * (count != 1)}" for count, name in named if count]
        return ", ".join(said) + (f" logged ({self.message})" if self.errors else "")


THREADED = 1 << 12 | 1 << 13 | 1 << 15
"""FFmpeg's AV_CODEC_CAP_FRAME_THREADS, _SLICE_THREADS and _OTHER_THREADS: a decoder that may log from other threads."""


class Ear:
    """Errors that one part of FFmpeg has logged: `errors` places, of which the first said `message`."""

    def __init__(self, part: str, lines: list[tuple[int, str, str]]) -> None:
        self.part, self.lines, self.errors, self.message = part, lines, 0, ""

    def hear(self) -> None:
        """Take what was logged since the last call: one error, however many lines."""
        if not self.lines:
            return
        texts = [" ".join(text.split()) for _, part, text in self.lines if part == self.part]
        self.lines.clear()
        if texts:
            self.errors += 1
            self.message = self.message or f"{self.part}: {texts[0]}"


_lock = threading.Lock()
_listeners = 0
_undo = ExitStack()


@contextmanager
def listening(part: str | None) -> Iterator[Ear]:
    """Hear the errors that the `part` of FFmpeg with this name logs in this thread; None hears nothing.

    FFmpeg's logging is one switch for the whole process. The first listener turns it on and the last one puts it back;
    what other threads log in between goes where it went before, which by default is nowhere.
    """
    global _listeners
    if part is None:
        yield Ear("", [])
        return
    av_logging = import_av().logging
    with _lock:
        if _listeners == 0:
            before = av_logging.get_level()
            if before is None:
                _undo.enter_context(av_logging.Capture(local=False))
            _undo.callback(av_logging.set_skip_repeated, av_logging.get_skip_repeated())
            _undo.callback(av_logging.set_level, before)
            av_logging.set_skip_repeated(False)
            av_logging.set_level(max(before or 0, av_logging.ERROR))
        _listeners += 1
    try:
        with av_logging.Capture() as lines:
            yield Ear(part, lines)
    finally:
        with _lock:
            _listeners -= 1
            if _listeners == 0:
                _undo.close()
