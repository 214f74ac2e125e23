"""Decoding: of a whole file, or of the spans that the sampled frames need, with every frame held against its packet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .damage import THREADED, Damage, Ear, listening
from .headers import Unproven
from .packets import Timeline
from .plan import Span
from .resize import Resizer
from .source import import_av, open_video

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

NEAR = 64
"""Packets that are read on rather than sought: less than a seek costs in MPEG-TS."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """Frames of a file at the positions that were wanted, each once.

    Attributes:
        resized: uint8 [1, size, size, 3] of each, in the order in which they are shown.
        times: float64 [count], seconds, of all frames of the file; `has_times` false where one has none.
        rate: frames per second that the container names, 0 where it does not.
        count: frames of the file.
        decoded: frames that were decoded for it.
        damage: what FFmpeg marked in those.
        width, height: as displayed, of the first frame.
        waited: seconds by which resizing has prolonged it.
        whole: why the whole file was decoded; empty where it was not.
    """

    resized: Sequence[NDArray[np.uint8]]
    times: NDArray[np.float64]
    has_times: bool
    rate: float
    count: int
    decoded: int
    damage: Damage
    width: int
    height: int
    waited: float
    whole: str = ""


class _Keeper:
    """Has the frames that are wanted converted and resized; `width` and `height` are the first frame's."""

    def __init__(self, wanted: Collection[int], resizer: Resizer) -> None:
        self.width = self.height = 0
        self._wanted, self._resizer = frozenset(wanted), resizer
        self._convert = import_av().video.reformatter.VideoReformatter().reformat

    def see(self, index: int, frame: VideoFrame) -> None:
        turns = round(frame.rotation / 90) % 4  # to the left, like those of np.rot90
        if index == 0:
            sides = frame.width, frame.height
            self.width, self.height = sides[::-1] if turns % 2 else sides
        if index in self._wanted:
            self._resizer.add(np.rot90(self._convert(frame, format="rgb24").to_ndarray(), turns))


def decode_whole(file: Path, wanted: Collection[int], size: int) -> Decoded:
    """Decode everything, keeping the frames at the positions `wanted` among all that come out."""
    times: list[float] = []
    has_times, corrupt, index = True, 0, 0
    with Resizer(size) as resizer:
        keeper = _Keeper(wanted, resizer)
        with open_video(file, "decoding") as (container, stream):
            rate = _rate(stream)
            with _decoding(stream) as ear:
                for index, frame in enumerate(container.decode(stream), start=1):
                    ear.hear()
                    corrupt += frame.is_corrupt
                    has_times &= frame.time is not None
                    times.append(frame.time or 0.0)
                    keeper.see(index - 1, frame)
                ear.hear()
        resized = resizer.results()
    damage = Damage(frames=corrupt, errors=ear.errors, message=ear.message)
    return Decoded(
        resized, np.asarray(times), has_times, rate, index, index, damage, keeper.width, keeper.height, resizer.waited
    )


def decode_spans(file: Path, timeline: Timeline, spans: Sequence[Span], wanted: Collection[int], size: int) -> Decoded:
    """Decode only the spans; the first frame of the file has to be wanted, and every wanted one to be in a span.

    Raises Unproven, with the frames decoded by then in `decoded`, as soon as a packet is not the one that was read
    before at its place, or a frame is not the one that the packets promise, or is marked as damaged.
    """
    decoded = 0
    with Resizer(size) as resizer:
        keeper = _Keeper(wanted, resizer)
        with open_video(file, "decoding") as (container, stream):
            rate, packets = _rate(stream), _Packets(container, stream, timeline)
            with _decoding(stream) as ear:
                try:
                    for span in spans:
                        for index, frame in _held_against(span, _frames(stream, packets, span), ear):
                            decoded += 1
                            if index is not None:
                                keeper.see(index, frame)
                except Unproven as doubt:
                    raise Unproven(str(doubt), decoded) from None
        resized = resizer.results()
    return Decoded(
        resized, timeline.seconds(), True, rate, len(timeline.pts), decoded, Damage(), keeper.width, keeper.height,
        resizer.waited,
    )


def _held_against(span: Span, frames: Iterator[VideoFrame], ear: Ear) -> Iterator[tuple[int | None, VideoFrame]]:
    """Every frame, with its position in the file, or None when it is shown before the span's entry or after its end.

    Raises Unproven unless they are the span's, in order and without a gap, and sound.
    """
    place = 0
    for frame in frames:
        ear.hear()
        if frame.is_corrupt or ear.errors:
            raise Unproven("a part that is needed is damaged")
        early = place == 0 and frame.pts is not None and frame.pts < span.shown[0]
        if early or place == len(span.shown):
            yield None, frame
            continue
        if frame.pts != span.shown[place]:
            raise Unproven("other frames come out than the packets promise")
        yield span.index + place, frame
        place += 1
    if place < len(span.shown):
        raise Unproven("fewer frames come out than the packets promise")


def _frames(stream: VideoStream, packets: _Packets, span: Span) -> Iterator[VideoFrame]:
    """All frames that a decoder gives for the packets of a span, and nothing else."""
    for packet in packets.of(span):
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)
    stream.codec_context.flush_buffers()


class _Packets:
    """Finds packets of a file again, by what they were when all of them were read."""

    def __init__(self, container: InputContainer, stream: VideoStream, timeline: Timeline) -> None:
        self._container, self._stream, self._timeline = container, stream, timeline
        self._position = {pts: position for position, pts in enumerate(timeline.pts.tolist())}
        self._packets = self._demux()
        self._next = 0

    def of(self, span: Span) -> Iterator[Packet]:
        """Raises Unproven where a packet is missing or another one than was read before."""
        yield self._find(span.first)
        for position in range(span.first + 1, span.last + 1):
            packet = next(self._packets, None)
            if packet is None or not self._is(packet, position):
                raise Unproven("reading it again gives other packets")
            yield packet
        self._next = span.last + 1

    def _find(self, first: int) -> Packet:
        sought = False
        if first - self._next > NEAR:
            # Matroska is sought by pts, MPEG-TS by dts; where one lands too late, another is tried.
            timeline = self._timeline
            before = timeline.entries[max(int(np.searchsorted(timeline.entries, first)) - 1, 0)]
            for time in (timeline.pts[first], timeline.dts[first], timeline.dts[before]):
                try:
                    self._container.seek(int(time), stream=self._stream)
                except import_av().FFmpegError:  # a container without an index, say
                    continue
                sought, self._packets = True, self._demux()
                found = self._search(first)
                if found is not None:
                    return found
        found = None if sought else self._search(first)
        if found is None:
            raise Unproven("seeking does not find a packet again")
        return found

    def _search(self, wanted: int) -> Packet | None:
        """Read on to that packet; None when it has been passed."""
        for packet in self._packets:
            position = self._position.get(packet.pts) if packet.pts is not None else None
            if position is not None and position >= wanted:
                return packet if self._is(packet, wanted) else None
        return None

    def _is(self, packet: Packet, position: int) -> bool:
        return packet.pts == self._timeline.pts[position] and packet.size == self._timeline.sizes[position]

    def _demux(self) -> Iterator[Packet]:
        return (packet for packet in self._container.demux(self._stream) if packet.size)


def _rate(stream: VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0)


def _decoding(stream: VideoStream) -> AbstractContextManager[Ear]:
    """Sets the decoder's threads, and listens to it where that can be."""
    stream.thread_type = "AUTO"
    codec = stream.codec_context.codec
    return listening(None if codec.capabilities & THREADED else codec.name)
