"""HEVC (Rec. ITU-T H.265): decoding may begin at an IDR or a CRA picture.

What is shown after a CRA picture refers to nothing before it, and reference pictures are named one by one, so that
nothing else gets into a list. What follows it in the file and is shown before it may be lost, and is not used.
"""

from __future__ import annotations

from collections.abc import Callable

from .bits import Bits, Sets, Unproven
from .nal import boxed_units, configuration, nal_units, payload, refuse_stateful_sei

PICTURES = range(32)
IDR, CRA = (19, 20), 21
SETS = VPS, SPS, PPS = 32, 33, 34
SEI = (39, 40)
HARMLESS = frozenset({35, 38, *range(48, 64)})  # delimiter, filler, unspecified: FFmpeg skips them


class HevcHeaders:
    closed = False

    def __init__(self, extradata: bytes) -> None:
        self._length_size, boxed = configuration(extradata, 21)
        self._sets = Sets()
        units: list[memoryview] = []
        if boxed:
            at = 23
            for _ in range(extradata[22] if len(extradata) > 22 else 0):
                found, at = boxed_units(extradata, at + 3, int.from_bytes(extradata[at + 1 : at + 3], "big"))
                units += found
        elif extradata:
            units = list(nal_units(memoryview(extradata), 0))
        for unit in units:
            self._other(unit, unit[0] >> 1 & 63, self._sets.configure)

    def entry(self, data: memoryview) -> bool:
        pictures, kinds = 0, set()
        for unit in nal_units(data, self._length_size):
            kind = unit[0] >> 1 & 63
            if kind not in PICTURES:
                self._other(unit, kind, self._sets.take)
                continue
            if len(unit) < 3 or unit[0] & 1 or unit[1] >> 3:
                raise Unproven("the stream has layers")
            if kind > 9 and kind not in (*IDR, CRA):
                raise Unproven(f"a picture of type {kind} makes a decoder leave others out")
            if kind > 9 and unit[2] & 64:
                raise Unproven("a picture keeps those before it from being shown")  # no_output_of_prior_pics_flag
            kinds.add(kind)
            pictures += unit[2] >> 7  # first_slice_segment_in_pic_flag
        if pictures != 1 or len(kinds) != 1:
            raise Unproven(f"a packet holds {pictures} pictures")
        self._sets.close()
        return kinds <= {*IDR, CRA}

    def check(self, reordered: int) -> None:
        """The sequence parameter set says how long a decoder waits."""

    def _other(self, unit: memoryview, kind: int, keep: Callable[[object, bytes], None]) -> None:
        if kind in SETS:
            name: object = kind
            if kind == PPS:
                bits = Bits(payload(unit, 2))
                name = (kind, bits.ue())
                bits.ue(), bits.u(1)
                if bits.u(1):  # output_flag_present_flag
                    raise Unproven("pictures may be hidden")
            keep(name, bytes(unit).rstrip(b"\0"))
        elif kind in SEI:
            refuse_stateful_sei(payload(unit, 2))
        elif kind not in HARMLESS:  # the ends of a sequence too: after one, a decoder leaves pictures out
            raise Unproven(f"a NAL unit of type {kind} is none of a plain HEVC stream")
