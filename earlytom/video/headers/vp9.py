"""VP9 (Bitstream & Decoding Process Specification 0.7): decoding may begin at a key frame, which resets everything."""

from __future__ import annotations

from collections.abc import Iterator

from .bits import Unproven


class Vp9Headers:
    closed = True

    def __init__(self, extradata: bytes) -> None:
        pass  # a frame says all that it needs

    def entry(self, data: memoryview) -> bool:
        frames = [_header(frame) for frame in _frames(data)]
        shown = sum(shown for _, shown in frames)
        if shown != 1:
            raise Unproven(f"a packet shows {shown} frames")
        return frames[0] == (True, True)

    def check(self, reordered: int) -> None:
        if reordered:
            raise Unproven("frames are not in the order of their timestamps")


def _frames(data: memoryview) -> Iterator[memoryview]:
    """The frames of a superframe (annex B): their sizes stand at its end, between two copies of a marker."""
    marker = data[-1]
    if marker & 0xE0 == 0xC0:
        width, count = (marker >> 3 & 3) + 1, (marker & 7) + 1
        index = data[-2 - width * count :]
        if len(index) == 2 + width * count and index[0] == marker:
            start, end = 0, len(data) - len(index)
            for i in range(count):
                size = int.from_bytes(index[1 + i * width : 1 + (i + 1) * width], "little")
                if not 1 <= size <= end - start:
                    raise Unproven("the frames of a packet do not add up")
                yield data[start : start + size]
                start += size
            return
    yield data


def _header(frame: memoryview) -> tuple[bool, bool]:
    """(key frame, shown) from the first bits of an uncompressed header (6.2)."""
    first = frame[0]
    if first >> 6 != 2:
        raise Unproven("a packet does not begin with a VP9 frame")
    if first >> 4 & 3 == 3:  # profile 3 has one bit more
        first <<= 1
    if first & 8:
        return False, True  # show_existing_frame
    return not first & 4, bool(first & 2)
