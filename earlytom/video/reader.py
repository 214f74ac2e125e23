"""A video file in, uint8 frames out: sampled like the released code, resized like the SigLIP processor.

The released code takes frames `linspace(0, n - 1, T)`, truncated, and hands them to SigLIP's image processor, which
resizes every frame with Pillow's bicubic filter, without a crop. Both are reproduced here on top of PyAV. A clip of
fewer than T frames, or an image, gives some of its frames several times, as there.

Memory is bounded by the frames asked for, not by the length of the video: the file is demuxed once to count packets
(no decoding), and only sampled frames become RGB. Where the packets prove which frame each of them is, only what the
sampled ones need is decoded, from the key frame before them. Else the whole file is, once; packets are nearly always
frames, and where they turn out not to be, the decoded count is the right one and the file is decoded a second time with
it. What the container says about its own length is never used, except to tell that the end of an AVI is missing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, VideoError
from .damage import Damage
from .decode import Decoded, decode_spans, decode_whole
from .headers import Unproven
from .packets import Packets, read_packets
from .plan import plan_spans
from .resize import import_pillow
from .source import REENCODE, check_file, import_av

WORTHWHILE = 0.75
"""Share of a file's packets up to which decoding only those is tried: seeking has its own price."""


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Sampled frames of one video and where they come from.

    Attributes:
        frames: uint8 [T, size, size, 3], RGB.
        indices: int64 [T], position of each frame among the `frame_count` decodable ones; equal ones are repeats.
        timestamps: float64 [T], seconds since the video's first frame.
        source: the file, as it was named.
        frame_count: decodable frames in the file.
        decoded: frames that were decoded for these, over all attempts.
        whole: why all of the file was decoded; empty where only what the sampled frames need was.
        damage: what FFmpeg marked as corrupt or missing: in all packets of the file, and in the frames that were
            decoded; false when there is none.
        fps: frames per second over the whole file, measured from timestamps (0 for a single frame without a rate).
        duration: seconds, the last frame's own share included.
        width, height: pixels of the source as displayed, after its rotation, at the first frame.
        decode_seconds: wall time of reading, decoding and converting to RGB.
        resize_seconds: wall time by which resizing, in threads beside that, has prolonged it.
    """

    frames: NDArray[np.uint8]
    indices: NDArray[np.int64]
    timestamps: NDArray[np.float64]
    source: str
    frame_count: int
    decoded: int
    whole: str
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
            Every frame of the file is decoded for it.

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
    found = _sample(file, frames, size, strict)
    total = time.perf_counter() - started

    count = found.count
    times = found.times - found.times[0] if found.has_times else np.arange(count) / (found.rate or 1.0)
    indices = sample_indices(count, frames)
    span = float(times.max())
    fps = (count - 1) / span if span > 0 else found.rate
    return VideoFrames(
        frames=np.concatenate(found.resized)[np.unique(indices, return_inverse=True)[1]],
        indices=indices,
        timestamps=times[indices].astype(np.float64),
        source=str(path),
        frame_count=count,
        decoded=found.decoded,
        whole=found.whole,
        damage=found.damage,
        fps=fps,
        duration=span + (1 / fps if fps > 0 else 0.0),
        width=found.width,
        height=found.height,
        decode_seconds=total - found.waited,
        resize_seconds=found.waited,
    )


def _sample(file: Path, frames: int, size: int, strict: bool) -> Decoded:
    """Decode what the sampled frames need; the whole file where that is not certain or saves little."""
    packets = read_packets(file)
    _refuse(file, packets.damage, strict)
    try:
        if strict:
            raise Unproven("strict reading inspects every frame")
        return _decode_sampled(file, packets, frames, size)
    except Unproven as doubt:
        whole, decoded = str(doubt), doubt.decoded
    except VideoError as error:  # what damage it is will be seen when all of it is decoded
        whole, decoded = str(error), 0
    found = _decode_all(file, packets, frames, size, strict)
    return replace(found, whole=whole, decoded=found.decoded + decoded)


def _decode_sampled(file: Path, packets: Packets, frames: int, size: int) -> Decoded:
    if packets.timeline is None:
        raise Unproven(packets.unproven)
    wanted = np.unique(sample_indices(packets.count, frames)).tolist()
    spans = plan_spans(packets.timeline, wanted)
    if sum(span.packets for span in spans) > WORTHWHILE * packets.count:
        raise Unproven("the sampled frames need most of it")
    return decode_spans(file, packets.timeline, spans, wanted, size)


def _decode_all(file: Path, packets: Packets, frames: int, size: int, strict: bool) -> Decoded:
    """Decode with the number of packets as the number of frames, and once more where it was not."""
    found = _decode_for(file, packets.count, frames, size)
    if found.count == 0:
        raise VideoError(f"{file}: not one frame of the video stream can be decoded; {REENCODE}")
    _refuse(file, packets.damage + found.damage, strict)
    if strict and found.count < frames:
        raise VideoError(
            f"{file}: the video has {_frames(found.count)} and {frames} are needed: "
            f"take a longer video or at most {_frames(found.count)}"
        )
    if found.count != packets.count:
        first = found
        found = _decode_for(file, first.count, frames, size)
        if found.count != first.count:
            raise VideoError(f"{file}: {first.count} frames decode at one time, {found.count} at another; {REENCODE}")
        found = replace(found, decoded=first.decoded + found.decoded)
    return replace(found, damage=packets.damage + found.damage)


def _decode_for(file: Path, count: int, frames: int, size: int) -> Decoded:
    """Decode the whole file for the frames that a video of `count` would be sampled at: right if that is its count."""
    return decode_whole(file, sample_indices(count, frames).tolist() if count else (), size)


def _refuse(file: Path, damage: Damage, strict: bool) -> None:
    if strict and damage:
        raise VideoError(f"{file}: damaged or cut off ({damage}); {REENCODE}")


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"
