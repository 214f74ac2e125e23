"""AV1 (Bitstream & Decoding Process Specification 1.0.0, errata 1): decoding may begin at a key frame that is shown.

It resets everything but the sequence header, which has to come with it.
"""

from __future__ import annotations

from collections.abc import Iterator

from .bits import Sets, Unproven

SEQUENCE, DELIMITER, FRAME_HEADER, TILES, METADATA, FRAME, REPEATED_HEADER, PADDING = 1, 2, 3, 4, 5, 6, 7, 15
HARMLESS = (DELIMITER, TILES, METADATA, REPEATED_HEADER, PADDING)


class Av1Headers:
    closed = True

    def __init__(self, extradata: bytes) -> None:
        self._sets = Sets()  # not those of the container: dav1d forgets them when it begins elsewhere

    def entry(self, data: memoryview) -> bool:
        frames, sequences = [], 0
        for kind, unit in _units(data):
            if kind == SEQUENCE:
                if not len(unit) or unit[0] & 0x18:  # still_picture, reduced_still_picture_header
                    raise Unproven("the stream is a still picture")
                self._sets.take(kind, bytes(unit))
                sequences += 1
            elif kind in (FRAME_HEADER, FRAME):
                first = unit[0] if len(unit) else 0
                existing = bool(first & 0x80)
                frames.append((not existing and first >> 5 & 3 == 0, existing or bool(first & 0x10)))
            elif kind not in HARMLESS:
                raise Unproven(f"a unit of type {kind} is none of a plain AV1 stream")
        shown = sum(shown for _, shown in frames)
        if shown != 1:
            raise Unproven(f"a packet shows {shown} frames")
        self._sets.close()
        return sequences > 0 and frames[0] == (True, True)

    def check(self, reordered: int) -> None:
        if reordered:
            raise Unproven("frames are not in the order of their timestamps")


def _units(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, payload) of each open bitstream unit (5.3)."""
    at = 0
    while at < len(data):
        header = data[at]
        at += 1
        if header & 4:  # extension: temporal and spatial layer
            if at >= len(data) or data[at] >> 3 & 3:
                raise Unproven("the stream has layers")
            at += 1
        size = len(data) - at
        if header & 2:
            size = shift = 0
            while True:
                if at >= len(data) or shift > 49:
                    raise Unproven("the units of a packet do not add up")
                byte = data[at]
                size |= (byte & 127) << shift
                at, shift = at + 1, shift + 7
                if byte < 128:
                    break
        if header & 0x80 or size > len(data) - at:
            raise Unproven("the units of a packet do not add up")
        yield header >> 3 & 15, data[at : at + size]
        at += size
