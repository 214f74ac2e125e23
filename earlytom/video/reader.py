"""A video file in, uint8 frames out: sampled like the released code, resized like the SigLIP processor.

The released code takes frames `linspace(0, n - 1, T)`, truncated, and hands them to SigLIP's image processor, which
resizes every frame with Pillow's bicubic filter, without a crop. Both are reproduced here on top of PyAV. A clip of
fewer than T frames, or an image, gives some of its frames several times, as there.

Memory is bounded by the frames asked for, not by the length of the video: the file is demuxed once to count packets
(no decoding), then decoded once, and only sampled frames become RGB. Packets are nearly always frames; where they turn
out not to be, the decoded count is the right one and the file is decoded a second time with it. What the container
says about its own length is never used, except to tell that the end of an AVI is missing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, VideoError
from .damage import THREADED, Damage, listening
from .resize import import_pillow, resize_frames
from .source import REENCODE, check_file, import_av, open_video

PENDING_BYTES = 64 * 2**20
"""Full-size RGB held before it is resized: ten 1080p frames, two or three 4K ones."""


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Sampled frames of one video and where they come from.

    Attributes:
        frames: uint8 [T, size, size, 3], RGB.
        indices: int64 [T], position of each frame among the `frame_count` decodable ones; equal ones are repeats.
        timestamps: float64 [T], seconds since the video's first frame.
        source: the file, as it was named.
        frame_count: decodable frames in the file.
        damage: what FFmpeg marked as corrupt or missing in the file; false for a sound one.
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
    damage: Damage
    fps: float
    duration: float
    width: int
    height: int
    decode_seconds: float
    resize_seconds: float

    @property
    def repeated(self) -> int:
        """How many of the T frames repeat the one before them, because the video has fewer than T."""
        return int((np.diff(self.indices) == 0).sum())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the frames, a line each; empty when there is nothing to say."""
        notes = []
        if self.repeated:
            notes.append(
                f"{self.source}: the video has {_frames(self.frame_count)} and {len(self.indices)} are needed, "
                f"so {self.repeated} {'are repeats' if self.repeated > 1 else 'is a repeat'}"
            )
        if self.damage:
            notes.append(f"{self.source}: damaged or cut off, so frames may show wrong pictures: {self.damage}")
        return tuple(notes)


def sample_indices(count: int, frames: int) -> NDArray[np.int64]:
    """Positions of `frames` frames spread over `count`: `linspace(0, count - 1, frames)`, truncated.

    Returns:
        int64 [frames], rising, first 0; last count - 1 when more than one is asked for. Strictly rising when there are
        as many as are asked for, else some are repeated.

    Raises:
        InputError: `frames` or `count` is below 1.
    """
    if frames < 1:
        raise InputError(f"frames is {frames}: at least 1 frame has to be sampled")
    if count < 1:
        raise InputError(f"{frames} frames cannot be sampled from {count}: at least 1 is needed")
    return np.linspace(0, count - 1, frames).astype(np.int64)


def read_frames(
    path: str | os.PathLike[str], *, frames: int, size: int = 384, strict: bool = False
) -> VideoFrames:
    """Sample `frames` frames of a video file evenly and resize them to size x size.

    The file's display rotation is honoured (as decord does for the released code); its pixel aspect ratio does not
    matter, since both sides become `size`. Only local files are read, also when the file is a playlist. An image is a
    video of one frame.

    Args:
        path: a local file in any container and codec that PyAV's FFmpeg knows.
        frames: T, frames to sample, at least 1.
        size: pixels of each side of the result.
        strict: refuse a video with fewer than `frames` frames, instead of repeating some, and one in which FFmpeg marks
            damage, instead of reporting it. `VideoFrames.repeated`, `.damage` and `.notes` tell what was let pass.

    Raises:
        InputError: `frames` or `size` is below 1.
        VideoError: the file is missing, a directory, unreadable, empty, not a video, without a video stream, damaged so
            that it does not decode, or refused by `strict`; or PyAV or Pillow is not installed.
    """
    if frames < 1:
        raise InputError(f"frames is {frames}: at least 1 frame has to be sampled")
    if size < 1:
        raise InputError(f"size is {size}: at least 1 pixel is needed")
    import_av()
    import_pillow()
    file = check_file(path)

    started = time.perf_counter()
    sample = _sample(file, frames, size, strict)
    total = time.perf_counter() - started

    count = sample.frame_count
    times = sample.times - sample.times[0] if sample.has_times else np.arange(count) / (sample.rate or 1.0)
    indices = sample_indices(count, frames)
    span = float(times.max())
    fps = (count - 1) / span if span > 0 else sample.rate
    return VideoFrames(
        frames=np.concatenate(sample.resized)[np.unique(indices, return_inverse=True)[1]],
        indices=indices,
        timestamps=times[indices].astype(np.float64),
        source=str(path),
        frame_count=count,
        damage=sample.damage,
        fps=fps,
        duration=span + (1 / fps if fps > 0 else 0.0),
        width=sample.width,
        height=sample.height,
        decode_seconds=total - sample.resize_seconds,
        resize_seconds=sample.resize_seconds,
    )


@dataclass
class _Sample:
    """What one decoding pass has gathered; a frame that is sampled several times is in `resized` once."""

    resized: list[NDArray[np.uint8]]
    times: NDArray[np.float64]
    has_times: bool
    rate: float
    frame_count: int
    damage: Damage
    width: int
    height: int
    resize_seconds: float


def _sample(file: Path, frames: int, size: int, strict: bool) -> _Sample:
    """Decode with the number of packets as the number of frames, and once more where it was not."""
    count, unread = _count_packets(file)
    _refuse(file, unread, strict)
    sample = _decode(file, count, frames, size)
    if sample.frame_count == 0:
        raise VideoError(f"{file}: not one frame of the video stream can be decoded; {REENCODE}")
    sample.damage = unread + sample.damage
    _refuse(file, sample.damage, strict)
    if strict and sample.frame_count < frames:
        raise VideoError(
            f"{file}: the video has {_frames(sample.frame_count)} and {frames} are needed: "
            f"take a longer video or at most {_frames(sample.frame_count)}"
        )
    if sample.frame_count != count:
        count = sample.frame_count
        sample = _decode(file, count, frames, size)
        sample.damage = unread + sample.damage
        if sample.frame_count != count:
            raise VideoError(f"{file}: {count} frames decode at one time, {sample.frame_count} at another; {REENCODE}")
    return sample


def _refuse(file: Path, damage: Damage, strict: bool) -> None:
    if strict and damage:
        raise VideoError(f"{file}: damaged or cut off ({damage}); {REENCODE}")


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _count_packets(file: Path) -> tuple[int, Damage]:
    """Packets of the video stream, without decoding: the likely number of frames, at the price of reading the file."""
    count = corrupt = missing = 0
    with open_video(file, "reading") as (container, stream), listening(container.format.name) as ear:
        last, gap = -1, 1  # of an AVI, whose clock counts the header's frames, dropped ones (no packet) included
        for packet in container.demux(stream):
            corrupt += packet.is_corrupt
            count += packet.size > 0 and not packet.is_discard
            if packet.dts is not None:
                last, gap = packet.dts, max(gap, packet.dts - last)
            ear.hear()
        ear.hear()
        if container.format.name == "avi":
            missing = max(0, stream.frames - last - gap)
    return count, Damage(packets=corrupt, missing=missing, errors=ear.errors, message=ear.message)


def _decode(file: Path, count: int, frames: int, size: int) -> _Sample:
    """Decode the whole file, keeping the frames that a video of `count` frames would be sampled at.

    The frames kept are right when `frame_count` of the answer equals `count`; the answer says so, it does not check.
    """
    wanted = set(sample_indices(count, frames).tolist()) if count else set()
    resized: list[NDArray[np.uint8]] = []
    pending: list[NDArray[np.uint8]] = []
    times: list[float] = []
    has_times, resize_seconds = True, 0.0
    width = height = index = corrupt = 0

    def flush() -> None:
        nonlocal resize_seconds
        started = time.perf_counter()
        resized.append(resize_frames(pending, size))
        pending.clear()
        resize_seconds += time.perf_counter() - started

    with open_video(file, "decoding") as (container, stream):
        convert = import_av().video.reformatter.VideoReformatter().reformat
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        codec = stream.codec_context.codec
        with listening(None if codec.capabilities & THREADED else codec.name) as ear:
            for index, frame in enumerate(container.decode(stream), start=1):
                ear.hear()
                corrupt += frame.is_corrupt
                has_times &= frame.time is not None
                times.append(frame.time or 0.0)
                turns = round(frame.rotation / 90) % 4  # to the left, like those of np.rot90
                if index == 1:
                    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
                if index - 1 in wanted:
                    pending.append(np.rot90(convert(frame, format="rgb24").to_ndarray(), turns))
                    if sum(item.nbytes for item in pending) >= PENDING_BYTES:
                        flush()
            ear.hear()
        if pending:
            flush()
    damage = Damage(frames=corrupt, errors=ear.errors, message=ear.message)
    return _Sample(resized, np.asarray(times), has_times, rate, index, damage, width, height, resize_seconds)
