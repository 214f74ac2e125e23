"""Motion JPEG (Rec. ITU-T T.81 annex B): decoding may begin anywhere if every picture brings the same tables.

A decoder keeps tables from one picture to the next, and cameras leave out those that are standard.
"""

from __future__ import annotations

from .bits import Unproven

SOI, SOS, DQT, DHT, APP0 = 0xD8, 0xDA, 0xDB, 0xC4, 0xE0


class MjpegHeaders:
    closed = True

    def __init__(self, extradata: bytes) -> None:
        self._tables: frozenset[tuple[int, int]] | None = None

    def entry(self, data: memoryview) -> bool:
        tables = _tables(data)
        if self._tables is None:
            self._tables = tables
        if tables != self._tables:
            raise Unproven("pictures differ in the tables that they bring")
        return True

    def check(self, reordered: int) -> None:
        if reordered:
            raise Unproven("frames are not in the order of their timestamps")


def _tables(data: memoryview) -> frozenset[tuple[int, int]]:
    """(marker, destination) of each table before the first scan."""
    if bytes(data[:2]) != b"\xff\xd8":
        raise Unproven("a packet does not begin with a JPEG picture")
    found: set[tuple[int, int]] = set()
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if marker == SOS:
            return frozenset(found)
        if marker == APP0 and bytes(segment[:4]) == b"AVI1" and any(segment[4:5]):
            raise Unproven("pictures are interlaced")
        place = 0
        while marker in (DQT, DHT) and place < len(segment):
            found.add((marker, segment[place]))
            if marker == DQT:
                place += 129 if segment[place] >> 4 else 65
            else:
                place += 17 + sum(segment[place + 1 : place + 17])
        at += 2 + length
    raise Unproven("a JPEG picture without a scan")
