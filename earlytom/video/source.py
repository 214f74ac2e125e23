"""A local video file opened with PyAV, and everything that can be wrong before its first frame, in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import VideoError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

REENCODE = "make a clean copy first, for example with `ffmpeg -i IN -c:v libx264 OUT.mp4`"


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise VideoError(
            f"reading a video needs PyAV ({error}): install it with `pip install earlytom-export[video]`"
        ) from error
    return av


def check_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    try:
        if file.is_dir():
            raise VideoError(f"{file}: this is a directory; a video file is needed")
        if not file.exists():
            raise VideoError(f"{file}: there is no such file; the path of a local video file is needed")
        if not file.is_file():
            raise VideoError(f"{file}: this is not a regular file; a video file is needed")
        with file.open("rb") as handle:
            if not handle.read(1):
                raise VideoError(f"{file}: the file is empty (0 bytes); a video file is needed")
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte in it
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{file}: the file cannot be read ({reason}); a readable video file is needed") from error
    return file


@contextmanager
def open_video(file: Path, doing: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file's main video stream; what FFmpeg raises inside the block becomes a VideoError.

    PyAV keeps FFmpeg's own messages off stderr unless a program asks for them, so there is nothing to silence.
    """
    av = import_av()
    try:
        # "file:" keeps a colon in a name from being read as a protocol; the whitelist keeps playlists off the network.
        container = av.open(f"file:{file}", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, UnicodeError) as error:
        raise VideoError(
            f"{file}: not a video that FFmpeg can open ({reason(error)}), or one that was cut off; "
            "a complete video file is needed"
        ) from error
    with container:
        pictures = av.stream.Disposition.attached_pic  # the cover of an audio file is no video
        streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams} - {"video"})
            raise VideoError(
                f"{file}: no video stream in it (only {', '.join(kinds) or 'pictures'}); a file with video is needed"
            )
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise VideoError(f"{file}: the installed FFmpeg has no decoder for this video; {REENCODE}")
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise VideoError(f"{file}: damaged, {doing} fails ({reason(error)}); {REENCODE}") from error
        finally:
            # Frees FFmpeg's decoding threads while Python is not held: PyAV closes decoders holding it, and a thread
            # that still wants to log would wait for it for ever.
            stream.codec_context.flush_buffers()


def reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".").lower()
