"""A video file in, uint8 frames out: sampled like the released code, resized like the SigLIP processor.

The released code takes frames `linspace(0, n - 1, T)`, truncated, and hands them to SigLIP's image processor, which
resizes every frame with Pillow's bicubic filter, without a crop. Both are reproduced here on top of PyAV.

Memory is bounded by the frames asked for, not by the length of the video: the file is demuxed once to count packets
(no decoding), then decoded once, and only sampled frames become RGB. Packets are nearly always frames; where they turn
out not to be, the decoded count is the right one and the file is decoded a second time with it. What the container
says about its own length is never used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, VideoError
from .resize import import_pillow, resize_each

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

PENDING_BYTES = 64 * 2**20
"""Full-size RGB held before it is resized: ten 1080p frames, two or three 4K ones."""


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Sampled frames of one video and where they come from.

    Attributes:
        frames: uint8 [T, size, size, 3], RGB.
        indices: int64 [T], position of each frame among the `frame_count` decodable ones.
        timestamps: float64 [T], seconds since the video's first frame.
        source: the file, as it was named.
        frame_count: decodable frames in the file.
        fps: frames per second over the whole file, measured from timestamps (0 for a single frame without a rate).
        duration: seconds, the last frame's own share included.
        width, height: pixels of the source as displayed, after its rotation, at the first frame.
        decode_seconds: wall time of reading, decoding and converting to RGB.
        resize_seconds: wall time of resizing.
    """

    frames: NDArray[np.uint8]
    indices: NDArray[np.int64]
    timestamps: NDArray[np.float64]
    source: str
    frame_count: int
    fps: float
    duration: float
    width: int
    height: int
    decode_seconds: float
    resize_seconds: float


def sample_indices(count: int, frames: int) -> NDArray[np.int64]:
    """Positions of `frames` frames spread over `count`: `linspace(0, count - 1, frames)`, truncated.

    Returns:
        int64 [frames], strictly rising, first 0; last count - 1 when more than one is asked for.

    Raises:
        InputError: `frames` is below 1 or above `count` (the same frame twice would be no sample).
    """
    if frames < 1:
        raise InputError(f"frames is {frames}: at least 1 frame has to be sampled")
    if count < frames:
        raise InputError(f"{frames} frames cannot be sampled from {count}: ask for {count} or fewer")
    return np.linspace(0, count - 1, frames).astype(np.int64)


def read_frames(path: str | os.PathLike[str], *, frames: int, size: int = 384) -> VideoFrames:
    """Sample `frames` frames of a video file evenly and resize them to size x size.

    The file's display rotation is honoured (as decord does for the released code); its pixel aspect ratio does not
    matter, since both sides become `size`. Only local files are read, also when the file is a playlist.

    Args:
        path: a local file in any container and codec that PyAV's FFmpeg knows.
        frames: T, frames to sample, at least 1.
        size: pixels of each side of the result.

    Raises:
        InputError: `frames` or `size` is below 1.
        VideoError: the file is missing, a directory, unreadable, empty, not a video, without a video stream, damaged,
            or has fewer than `frames` frames; or PyAV or Pillow is not installed.
    """
    if frames < 1:
        raise InputError(f"frames is {frames}: at least 1 frame has to be sampled")
    if size < 1:
        raise InputError(f"size is {size}: at least 1 pixel is needed")
    _import_av()
    import_pillow()
    file = _check_file(path)

    started = time.perf_counter()
    count = _count_packets(file)
    sample = _decode(file, count, frames, size)
    if sample.frame_count != count and sample.frame_count >= frames:
        count = sample.frame_count
        sample = _decode(file, count, frames, size)
        if sample.frame_count != count:
            raise VideoError(f"{file}: {count} frames decode at one time, {sample.frame_count} at another; {_REENCODE}")
    if sample.frame_count < frames:
        raise VideoError(
            f"{file}: the video has {sample.frame_count} frame{'s' * (sample.frame_count != 1)} and {frames} are "
            f"needed: take a longer video or at most {sample.frame_count} frames"
            if sample.frame_count
            else f"{file}: not one frame of the video stream can be decoded; {_REENCODE}"
        )
    total = time.perf_counter() - started

    times = sample.times - sample.times[0] if sample.has_times else np.arange(count) / (sample.rate or 1.0)
    indices = sample_indices(count, frames)
    span = float(times.max())
    fps = (count - 1) / span if span > 0 else sample.rate
    return VideoFrames(
        frames=np.concatenate(sample.resized),
        indices=indices,
        timestamps=times[indices].astype(np.float64),
        source=str(path),
        frame_count=count,
        fps=fps,
        duration=span + (1 / fps if fps > 0 else 0.0),
        width=sample.width,
        height=sample.height,
        decode_seconds=total - sample.resize_seconds,
        resize_seconds=sample.resize_seconds,
    )


_REENCODE = "make a clean copy first, for example with `ffmpeg -i IN -c:v libx264 OUT.mp4`"


@dataclass
class _Sample:
    """What one decoding pass has gathered."""

    resized: list[NDArray[np.uint8]]
    times: NDArray[np.float64]
    has_times: bool
    rate: float
    frame_count: int
    width: int
    height: int
    resize_seconds: float


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise VideoError(
            f"reading a video needs PyAV ({error}): install it with `pip install earlytom-export[video]`"
        ) from error
    return av


def _check_file(path: str | os.PathLike[str]) -> Path:
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
def _open(file: Path, doing: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file's main video stream; what FFmpeg raises inside the block becomes a VideoError.

    PyAV keeps FFmpeg's own messages off stderr unless a program asks for them, so there is nothing to silence.
    """
    av = _import_av()
    try:
        # "file:" keeps a colon in a name from being read as a protocol; the whitelist keeps playlists off the network.
        container = av.open(f"file:{file}", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, UnicodeError) as error:
        raise VideoError(
            f"{file}: not a video that FFmpeg can open ({_reason(error)}), or one that was cut off; "
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
            raise VideoError(f"{file}: the installed FFmpeg has no decoder for this video; {_REENCODE}")
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise VideoError(f"{file}: damaged, {doing} fails ({_reason(error)}); {_REENCODE}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".").lower()


def _count_packets(file: Path) -> int:
    """Packets of the video stream, without decoding: the likely number of frames, at the price of reading the file."""
    count = 0
    with _open(file, "reading") as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(f"{file}: damaged or cut off at frame {count}; {_REENCODE}")
            count += packet.size > 0 and not packet.is_discard
    return count


def _decode(file: Path, count: int, frames: int, size: int) -> _Sample:
    """Decode the whole file, keeping the frames that a video of `count` frames would be sampled at.

    The frames kept are right when `frame_count` of the answer equals `count`; the answer says so, it does not check.
    """
    wanted = set(sample_indices(count, frames).tolist()) if count >= frames else set()
    resized: list[NDArray[np.uint8]] = []
    pending: list[NDArray[np.uint8]] = []
    times: list[float] = []
    has_times, resize_seconds = True, 0.0
    width = height = index = 0

    def flush() -> None:
        nonlocal resize_seconds
        started = time.perf_counter()
        resized.append(resize_each(pending, size))
        pending.clear()
        resize_seconds += time.perf_counter() - started

    with _open(file, "decoding") as (container, stream):
        convert = _import_av().video.reformatter.VideoReformatter().reformat
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        for index, frame in enumerate(container.decode(stream), start=1):
            if frame.is_corrupt:
                raise VideoError(f"{file}: damaged, frame {index - 1} does not decode whole; {_REENCODE}")
            has_times &= frame.time is not None
            times.append(frame.time or 0.0)
            turns = round(frame.rotation / 90) % 4  # to the left, like those of np.rot90
            if index == 1:
                width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
            if index - 1 in wanted:
                pending.append(np.rot90(convert(frame, format="rgb24").to_ndarray(), turns))
                if sum(item.nbytes for item in pending) >= PENDING_BYTES:
                    flush()
        if pending:
            flush()
    return _Sample(resized, np.asarray(times), has_times, rate, index, width, height, resize_seconds)
