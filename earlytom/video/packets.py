"""The packets of a file, read without decoding: how many there are, when they are shown, where decoding may begin."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .damage import Damage, listening
from .headers import Headers, Unproven, headers_of
from .source import import_av, open_video

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

LONGEST_WAIT = 32
"""Packets that a decoder may have to wait for; H.264 and HEVC allow 16."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """Packets of a stream in which each one is a frame that is shown, in the order of the file.

    Attributes:
        pts: int64 [N], when each is shown, in units of `time_base`; all are different.
        dts: int64 [N], when each is decoded, rising; as `pts` where the container does not say.
        sizes: int64 [N], bytes.
        entries: int64 [E], rising: packets from which on all frames with at least their pts decode as from the start.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    entries: NDArray[np.int64]
    time_base: Fraction

    def seconds(self) -> NDArray[np.float64]:
        """float64 [N], rising: the times of all frames, as PyAV computes `frame.time`."""
        return np.sort(self.pts).astype(np.float64) * self.time_base.numerator / self.time_base.denominator


SOUND = Damage()


@dataclass(frozen=True)
class Packets:
    """What reading a file without decoding has found.

    Attributes:
        count: packets, the likely number of frames.
        damage: what FFmpeg marked in them.
        timeline: None where `unproven` says why frames cannot be told from packets for certain.
    """

    count: int
    damage: Damage = SOUND
    timeline: Timeline | None = None
    unproven: str = ""


def read_packets(file: Path) -> Packets:
    """Demux the whole file once."""
    count = corrupt = missing = 0
    with open_video(file, "reading") as (container, stream), listening(container.format.name) as ear:
        last, gap = -1, 1  # of an AVI, whose clock counts the header's frames, dropped ones (no packet) included
        witness = _Witness(stream)
        for packet in container.demux(stream):
            corrupt += packet.is_corrupt
            count += packet.size > 0 and not packet.is_discard
            if packet.dts is not None:
                last, gap = packet.dts, max(gap, packet.dts - last)
            witness.see(packet)
            ear.hear()
        ear.hear()
        if container.format.name == "avi":
            missing = max(0, stream.frames - last - gap)
        damage = Damage(packets=corrupt, missing=missing, errors=ear.errors, message=ear.message)
    if damage:
        return Packets(count, damage, unproven="the file is damaged")
    return Packets(count, damage, witness.timeline(), witness.unproven)


class _Witness:
    """Looks at one packet after the other, until one proves nothing; `unproven` says which doubt it was."""

    def __init__(self, stream: VideoStream) -> None:
        self.unproven = ""
        self._headers: Headers | None = None
        self._rows: list[tuple[int, int, int]] = []
        self._entries: list[int] = []
        self._time_base = stream.time_base
        try:
            if not shows_side_data():
                raise Unproven("PyAV before 16 does not show whether a stream's parameters change on the way")
            self._headers = headers_of(stream.codec_context.name, bytes(stream.codec_context.extradata or b""))
        except Unproven as doubt:
            self.unproven = str(doubt)

    def see(self, packet: Packet) -> None:
        if self.unproven or self._headers is None or not packet.size:
            return
        try:
            if packet.is_discard:
                raise Unproven("an edit list leaves packets out")
            if packet.pts is None:
                raise Unproven("packets have no timestamps")
            if packet.has_sidedata("new_extradata") or packet.has_sidedata("param_change"):
                raise Unproven("the stream's parameters change on the way")
            if self._headers.entry(memoryview(packet)):
                self._entries.append(len(self._rows))
            self._rows.append((packet.pts, packet.pts if packet.dts is None else packet.dts, packet.size))
        except Unproven as doubt:
            self.unproven = str(doubt)
            self._rows.clear()

    def timeline(self) -> Timeline | None:
        if self._headers is None or self._time_base is None or not self._rows:
            self.unproven = self.unproven or "there are no packets"
            return None
        pts, dts, sizes = np.array(self._rows, np.int64).T
        entries = np.array(self._entries, np.int64)
        try:
            check_order(pts, entries, closed=self._headers.closed)
            self._headers.check(most_reordered(pts))
        except Unproven as doubt:
            self.unproven = str(doubt)
            return None
        return Timeline(pts, dts, sizes, entries, self._time_base)


def shows_side_data() -> bool:
    """Whether the installed PyAV tells what comes with a packet, such as parameters for those from there on."""
    return hasattr(import_av().Packet, "has_sidedata")


def check_order(pts: NDArray[np.int64], entries: NDArray[np.int64], *, closed: bool) -> None:
    """Raises Unproven unless timestamps differ, and the file begins with an entry, and entries part it in time too."""
    if len(np.unique(pts)) < len(pts):
        raise Unproven("two packets have the same timestamp")
    if not len(entries) or entries[0] or pts.argmin():
        raise Unproven("decoding cannot begin at the first packet without losing frames")
    before = np.maximum.accumulate(pts)[entries[1:] - 1]
    from_here = np.minimum.accumulate(pts[::-1])[::-1][entries]
    if (before >= pts[entries[1:]]).any() or (closed and (from_here < pts[entries]).any()):
        raise Unproven("timestamps contradict the order in which frames are decoded")


def most_reordered(pts: NDArray[np.int64]) -> int:
    """The most packets that precede one in the file and are shown after it: what a decoder has to wait for."""
    waiting = np.zeros(len(pts), np.int64)
    for distance in range(1, min(LONGEST_WAIT, len(pts) - 1) + 1):
        waiting[distance:] += pts[:-distance] > pts[distance:]
    return int(waiting.max(initial=0))
