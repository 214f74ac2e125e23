"""H.264 (Rec. ITU-T H.264): decoding may begin at an IDR picture, after which nothing refers to what was before.

A recovery point (open GOP, intra refresh) is no entry: the pictures after it need not refer to what was before, but
FFmpeg fills the gap with pictures of its own, which can get into reference lists.
"""

from __future__ import annotations

from collections.abc import Callable

from .bits import Bits, Sets, Unproven
from .nal import boxed_units, configuration, nal_units, payload, refuse_stateful_sei

SLICE, IDR, SEI, SPS, PPS = 1, 5, 6, 7, 8
HARMLESS = frozenset({9, 10, 11, 12, 13, 19})  # delimiters, ends, filler; an extension and alpha, which FFmpeg skips
HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})


class H264Headers:
    closed = True

    def __init__(self, extradata: bytes) -> None:
        self._length_size, boxed = configuration(extradata, 4)
        self._sets = Sets()
        self._declared: list[int | None] = []  # by each sequence parameter set: how many pictures are waited for
        if boxed:
            sequences, at = boxed_units(extradata, 6, extradata[5] & 31)
            pictures, _ = boxed_units(extradata, at + 1, extradata[at] if at < len(extradata) else 0)
            units = sequences + pictures
        else:
            units = list(nal_units(memoryview(extradata), 0)) if extradata else []
        for unit in units:
            self._parameters(unit, self._sets.configure)

    def entry(self, data: memoryview) -> bool:
        pictures, kinds = 0, set()
        for unit in nal_units(data, self._length_size):
            kind = unit[0] & 31
            if kind in (SLICE, IDR):
                kinds.add(kind)
                pictures += unit[1] >> 7  # first_mb_in_slice, an Exp-Golomb code, is 0
            elif kind == SEI:
                refuse_stateful_sei(payload(unit, 1))
            elif kind in (SPS, PPS):
                self._parameters(unit, self._sets.take)
            elif kind not in HARMLESS:
                raise Unproven(f"a NAL unit of type {kind} is none of a plain H.264 stream")
        if pictures != 1 or len(kinds) != 1:
            raise Unproven(f"a packet holds {pictures} pictures")
        self._sets.close()
        return IDR in kinds

    def check(self, reordered: int) -> None:
        """A decoder that is not told how many pictures it has to wait for guesses, and drops those that come late."""
        if not self._declared:
            raise Unproven("the stream has no parameters")
        if any(reordered > (declared or 0) for declared in self._declared):
            raise Unproven(f"{reordered} pictures have to be waited for, and the stream's parameters do not say so")

    def _parameters(self, unit: memoryview, keep: Callable[[object, bytes], None]) -> None:
        kind = unit[0] & 31
        if kind == PPS:
            keep((kind, Bits(payload(unit, 1)).ue()), bytes(unit).rstrip(b"\0"))
        elif kind == SPS:
            keep(kind, bytes(unit).rstrip(b"\0"))
            declared = reorder_of(payload(unit, 1))
            if declared not in self._declared:
                self._declared.append(declared)


def reorder_of(sps: bytes) -> int | None:
    """max_num_reorder_frames of a sequence parameter set (7.3.2.1.1, E.1.1), None where it is not there.

    Raises Unproven where pictures may be fields, of which two make a frame.
    """
    bits = Bits(sps)
    profile = bits.u(8)
    bits.u(16)
    bits.ue()
    if profile in HIGH_PROFILES:
        chroma = bits.ue()
        if chroma == 3:
            bits.u(1)
        bits.ue(), bits.ue(), bits.u(1)  # bit depths, lossless
        if bits.u(1):
            for index in range(12 if chroma == 3 else 8):
                if bits.u(1):
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    bits.ue()
    order = bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.u(1), bits.se(), bits.se()
        for _ in range(bits.ue()):
            bits.se()
    bits.ue(), bits.u(1), bits.ue(), bits.ue()  # reference frames, gaps, width, height
    if not bits.u(1):
        raise Unproven("pictures may be interlaced")
    bits.u(1)
    if bits.u(1):  # cropping
        bits.ue(), bits.ue(), bits.ue(), bits.ue()
    return _reorder_of_usability(bits) if bits.u(1) else None


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


def _reorder_of_usability(bits: Bits) -> int | None:
    if bits.u(1) and bits.u(8) == 255:  # aspect ratio
        bits.u(32)
    if bits.u(1):  # overscan
        bits.u(1)
    if bits.u(1):  # video signal
        bits.u(4)
        if bits.u(1):
            bits.u(24)
    if bits.u(1):  # chroma location
        bits.ue(), bits.ue()
    if bits.u(1):  # timing
        bits.u(65)
    units, slices = _skip_hypothetical_decoder(bits), _skip_hypothetical_decoder(bits)
    if units or slices:
        bits.u(1)
    bits.u(1)
    if not bits.u(1):
        return None
    bits.u(1), bits.ue(), bits.ue(), bits.ue(), bits.ue()
    return bits.ue()


def _skip_hypothetical_decoder(bits: Bits) -> bool:
    """Whether it was there."""
    if not bits.u(1):
        return False
    count = bits.ue() + 1
    bits.u(8)
    for _ in range(count):
        bits.ue(), bits.ue(), bits.u(1)
    bits.u(20)
    return True
