"""NAL units, of which H.264 and HEVC packets are made, with their lengths before them or start codes between them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .bits import Unproven

START = re.compile(b"\0\0\1")

STATEFUL_SEI = frozenset({19, 47, 147})
"""Film grain, display orientation, alternative transfer: messages that change how later pictures look.

Rec. ITU-T H.274 and H.265 annex D, payloadType. Others say when, what for, or how to check.
"""


def nal_units(data: memoryview, length_size: int) -> Iterator[memoryview]:
    """The units of a packet; length_size: bytes of the length before each, 0 with start codes (annex B).

    Raises Unproven where lengths do not add up to the packet's or it does not begin with a start code.
    """
    if length_size:
        start, end = 0, len(data)
        while start < end:
            length = int.from_bytes(data[start : start + length_size], "big")
            start += length_size
            if not 2 <= length <= end - start:
                raise Unproven("a packet is not made of whole NAL units")
            yield data[start : start + length]
            start += length
        return
    starts = [match.end() for match in START.finditer(data)]
    if not starts or any(data[: starts[0] - 3]):
        raise Unproven("a packet is not made of whole NAL units")
    for start, end in zip(starts, [start - 3 for start in starts[1:]] + [len(data)]):
        if end - start < 2:
            raise Unproven("a packet is not made of whole NAL units")
        yield data[start:end]


def payload(unit: memoryview, header: int) -> bytes:
    """What follows the header, without the bytes that keep start codes out of it, and without the zeros after it."""
    return bytes(unit[header:]).rstrip(b"\0").replace(b"\0\0\3", b"\0\0")


def refuse_stateful_sei(message: bytes) -> None:
    """Walk the messages of one SEI unit (H.264 7.3.2.3.1, HEVC 7.3.5); Unproven for those that outlive a picture."""
    at, end = 0, len(message) - 1  # the last byte holds the stop bit
    while at < end:
        sizes = []
        for _ in range(2):  # payload type, payload size: bytes of 255 and one that is less, added up
            value = 0
            while at < end and message[at] == 255:
                value, at = value + 255, at + 1
            sizes.append(value + message[at])
            at += 1
        if sizes[0] in STATEFUL_SEI:
            raise Unproven(f"an SEI message of type {sizes[0]} changes how later pictures look")
        at += sizes[1]


def configuration(extradata: bytes, lengths_at: int) -> tuple[int, bool]:
    """(length size of a stream's NAL units, whether extradata is an avcC or hvcC box): 0, False with start codes."""
    if extradata[:1] != b"\1":
        return 0, False
    if len(extradata) <= lengths_at:
        raise Unproven("the stream's configuration is cut off")
    return (extradata[lengths_at] & 3) + 1, True


def boxed_units(extradata: bytes, at: int, count: int) -> tuple[list[memoryview], int]:
    """`count` units with 16-bit lengths from `at` on, and where they end."""
    units = []
    for _ in range(count):
        length = int.from_bytes(extradata[at : at + 2], "big")
        units.append(memoryview(extradata)[at + 2 : at + 2 + length])
        at += 2 + length
        if length < 2 or at > len(extradata):
            raise Unproven("the stream's configuration is cut off")
    return units, at
