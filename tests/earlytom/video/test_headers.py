"""What headers prove, on bytes written by hand after the specifications; and only Unproven on any other bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from earlytom.video.headers import HEADERS, Headers, Unproven, headers_of
from earlytom.video.headers.h264 import reorder_of
from earlytom.video.headers.nal import payload


class Writer:
    """Writes the bits that a header is made of."""

    def __init__(self) -> None:
        self.bits = ""

    def u(self, count: int, value: int) -> Writer:
        self.bits += f"{value:0{count}b}"
        return self

    def ue(self, *values: int) -> Writer:
        for value in values:
            code = f"{value + 1:b}"
            self.bits += "0" * (len(code) - 1) + code
        return self

    def se(self, value: int) -> Writer:
        return self.ue(2 * value - 1 if value > 0 else -2 * value)

    def bytes(self) -> bytes:
        padded = self.bits + "1"
        padded += "0" * (-len(padded) % 8)
        return int(padded, 2).to_bytes(len(padded) // 8, "big")


def sps(
    *, frames_only: int = 1, reorder: int | None = 2, high: bool = False, order_type: int = 0,
    hypothetical: bool = False,
) -> bytes:
    """A sequence parameter set of H.264 without its NAL header."""
    writer = Writer().u(8, 100 if high else 77).u(16, 30).ue(0)
    if high:
        writer.ue(3).u(1, 0).ue(0, 0).u(1, 0).u(1, 1)  # 4:4:4, with scaling matrices
        for index in range(12):
            writer.u(1, index in (0, 7))
            if index == 0:
                writer.se(-8)  # "use the default": nothing follows
            elif index == 7:
                for _ in range(64):
                    writer.se(1)
    writer.ue(0, order_type)
    if order_type == 0:
        writer.ue(2)
    elif order_type == 1:
        writer.u(1, 0).se(-3).se(4).ue(2).se(1).se(-1)
    writer.ue(4).u(1, 0).ue(79, 44).u(1, frames_only)
    if not frames_only:
        writer.u(1, 1)
    writer.u(1, 1).u(1, 1).ue(0, 0, 0, 2)
    if reorder is None:
        return writer.u(1, 0).bytes()
    writer.u(1, 1).u(1, 1).u(8, 255).u(32, 0x00010001).u(1, 1).u(1, 0)  # aspect ratio, overscan
    writer.u(1, 1).u(4, 10).u(1, 1).u(24, 0x010101).u(1, 1).ue(1, 1)  # signal, chroma location
    writer.u(1, 1).u(32, 1).u(32, 50).u(1, 1)  # timing
    writer.u(1, hypothetical)
    if hypothetical:
        writer.ue(1).u(8, 0).ue(9, 9).u(1, 0).ue(9, 9).u(1, 1).u(20, 0)
    writer.u(1, 0)
    if hypothetical:
        writer.u(1, 0)
    return writer.u(1, 0).u(1, 1).u(1, 1).ue(0, 0, 10, 10, reorder, 4).bytes()


def escaped(data: bytes) -> bytes:
    """With the bytes that keep start codes out of it (H.264 7.4.1.1)."""
    done = bytearray()
    for byte in data:
        if byte <= 3 and done[-2:] == b"\0\0":
            done.append(3)
        done.append(byte)
    return bytes(done)


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("order_type", [0, 1, 2])
@pytest.mark.parametrize("hypothetical", [False, True])
@pytest.mark.parametrize("reorder", [None, 0, 2, 16])
def test_sequence_parameter_sets(high: bool, order_type: int, hypothetical: bool, reorder: int | None) -> None:
    made = sps(high=high, order_type=order_type, hypothetical=hypothetical, reorder=reorder)
    assert reorder_of(made) == reorder
    with pytest.raises(Unproven, match="interlaced"):
        reorder_of(sps(frames_only=0, high=high, order_type=order_type))


@given(st.binary(min_size=1).map(lambda data: data.rstrip(b"\0") + b"\x80"))
@example(b"\0\0\0\0\0\1\0\0\3\0\0\3\3\x80")
def test_payload_undoes_escaping(data: bytes) -> None:
    assert payload(memoryview(b"\x67" + escaped(data) + b"\0\0"), 1) == data


def start_codes(*units: bytes) -> memoryview:
    return memoryview(b"".join(b"\0\0\0\1" + unit for unit in units))


H264_SETS = (b"\x67" + escaped(sps()), b"\x68" + Writer().ue(0, 0).bytes())
H264_IDR, H264_SLICE, H264_REST = b"\x65\x88\x80", b"\x41\x9a\x10", b"\x41\x4a\x10"
HEVC_SETS = (
    b"\x40\1\x0c\1", b"\x42\1\1\1", b"\x44\1" + Writer().ue(0, 0).u(1, 0).u(1, 0).bytes(),
)
HEVC_IDR, HEVC_CRA, HEVC_SLICE = b"\x26\1\xaf", b"\x2a\1\xaf", b"\2\1\xd0"


def units(*kinds: bytes) -> memoryview:
    """AV1's, each with its length."""
    return memoryview(b"".join(kind[:1] + bytes([len(kind) - 1]) + kind[1:] for kind in kinds))


AV1_SEQUENCE, AV1_AGAIN = b"\x0a\0\0", b"\x1a\x80"
AV1_KEY, AV1_SHOWN, AV1_HIDDEN = b"\x32\x10", b"\x32\x30", b"\x32\x20"


def superframe(*frames: bytes) -> memoryview:
    marker = bytes([0xC0 | 1 << 3 | len(frames) - 1])
    sizes = b"".join(len(frame).to_bytes(2, "little") for frame in frames)
    return memoryview(b"".join(frames) + marker + sizes + marker)


VP9_KEY, VP9_SHOWN, VP9_HIDDEN, VP9_AGAIN = b"\x82\1", b"\x86\1", b"\x84\1", b"\x88\1"


def jpeg(*tables: int, polarity: int = 0, scan: bool = True) -> memoryview:
    """tables: destinations of quantisation tables; a pair of Huffman tables follows them."""
    data = b"\xff\xd8\xff\xe0\0\7AVI1" + bytes([polarity])
    for table in tables:
        data += b"\xff\xdb\0\x43" + bytes([table]) + bytes(64)
    data += b"\xff\xc4\0\x27" + (b"\0\1" + bytes(15) + b"\5") + (b"\x10\2" + bytes(15) + b"\5\6")
    return memoryview(data + (b"\xff\xda\0\2\1\2\3" if scan else b""))


PACKETS: dict[str, tuple[str, list[memoryview], list[bool]]] = {
    "h264": ("h264", [start_codes(*H264_SETS, H264_IDR), start_codes(H264_SLICE, H264_REST),
                      start_codes(b"\x09\xf0", H264_SETS[1], H264_IDR)], [True, False, True]),
    "hevc": ("hevc", [start_codes(*HEVC_SETS, HEVC_IDR), start_codes(HEVC_SLICE), start_codes(HEVC_CRA)],
             [True, False, True]),
    "vp9": ("vp9", [memoryview(VP9_KEY), superframe(VP9_HIDDEN, VP9_SHOWN), memoryview(VP9_AGAIN),
                    superframe(VP9_KEY, VP9_HIDDEN)], [True, False, False, True]),
    "av1": ("libdav1d", [units(b"\x12", AV1_SEQUENCE, AV1_KEY), units(b"\x12", AV1_HIDDEN, AV1_SHOWN),
                         units(b"\x12", AV1_AGAIN), units(AV1_SEQUENCE, AV1_KEY, AV1_HIDDEN),
                         units(AV1_KEY)], [True, False, False, True, False]),
    "mjpeg": ("mjpeg", [jpeg(0, 1), jpeg(0, 1)], [True, True]),
}


@pytest.mark.parametrize("name", PACKETS)
def test_entries(name: str) -> None:
    decoder, packets, entries = PACKETS[name]
    headers = headers_of(decoder, b"")
    assert [headers.entry(packet) for packet in packets] == entries
    headers.check(0)


REFUSED: dict[str, tuple[str, list[memoryview], str]] = {
    "two pictures": ("h264", [start_codes(*H264_SETS, H264_IDR, H264_IDR)], "holds 2 pictures"),
    "no picture": ("h264", [start_codes(*H264_SETS)], "holds 0 pictures"),
    "new parameters": ("h264", [start_codes(*H264_SETS, H264_IDR),
                                start_codes(b"\x68" + Writer().ue(0, 1).bytes(), H264_SLICE)], "change on the way"),
    "late parameters": ("h264", [start_codes(*H264_SETS, H264_IDR),
                                 start_codes(b"\x68" + Writer().ue(1, 0).bytes(), H264_SLICE)], "change on the way"),
    "turned": ("h264", [start_codes(*H264_SETS, b"\6\5\2ab\x2f\1\0\x80", H264_IDR)], "type 47"),
    "grain": ("hevc", [start_codes(*HEVC_SETS, b"\x4e\1\x13\1\0\x80", HEVC_IDR)], "type 19"),
    "partitions": ("h264", [start_codes(*H264_SETS, b"\x42\x88\x80")], "none of a plain H.264"),
    "lengths": ("h264", [memoryview(b"\0\0\0\x09\x65\x88")], "whole NAL units"),
    "broken link": ("hevc", [start_codes(*HEVC_SETS, b"\x20\1\xaf")], "leave others out"),
    "not shown before": ("hevc", [start_codes(*HEVC_SETS, b"\x26\1\xff")], "from being shown"),
    "end of sequence": ("hevc", [start_codes(*HEVC_SETS, HEVC_IDR, b"\x48\1")], "none of a plain HEVC"),
    "may be hidden": ("hevc", [start_codes(b"\x44\1" + Writer().ue(0, 0).u(1, 0).u(1, 1).bytes(), HEVC_IDR)], "hidden"),
    "layers": ("hevc", [start_codes(*HEVC_SETS, b"\x26\x09\xaf")], "layers"),
    "hidden": ("vp9", [memoryview(VP9_HIDDEN)], "shows 0"),
    "two": ("vp9", [superframe(VP9_KEY, VP9_SHOWN)], "shows 2"),
    "sizes": ("vp9", [memoryview(superframe(VP9_KEY, VP9_HIDDEN)[1:])], "do not add up|does not begin"),
    "two of AV1": ("libdav1d", [units(AV1_SEQUENCE, AV1_KEY, AV1_SHOWN)], "shows 2"),
    "another sequence": ("libdav1d", [units(AV1_SEQUENCE, AV1_KEY), units(b"\x0a\1\0", AV1_KEY)], "change on the way"),
    "still": ("libdav1d", [units(b"\x0a\x18", AV1_KEY)], "still picture"),
    "AV1 layers": ("libdav1d", [memoryview(b"\x36\x08\1\x10")], "layers"),
    "other tables": ("mjpeg", [jpeg(0, 1), jpeg(0)], "differ in the tables"),
    "fields": ("mjpeg", [jpeg(0, 1, polarity=1)], "interlaced"),
    "no scan": ("mjpeg", [jpeg(0, 1, scan=False)], "without a scan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_proves_nothing(name: str) -> None:
    decoder, packets, why = REFUSED[name]
    headers = headers_of(decoder, b"")
    for packet in packets[:-1]:
        headers.entry(packet)
    with pytest.raises(Unproven, match=why):
        headers.entry(packets[-1])


def test_what_an_h264_decoder_is_not_told() -> None:
    for declared, reordered, fine in ((2, 2, True), (2, 3, False), (None, 0, True), (None, 1, False)):
        headers = headers_of("h264", b"")
        headers.entry(start_codes(b"\x67" + escaped(sps(reorder=declared)), H264_SETS[1], H264_IDR))
        if fine:
            headers.check(reordered)
        else:
            with pytest.raises(Unproven, match="waited for"):
                headers.check(reordered)


def test_boxes_of_parameter_sets() -> None:
    """avcC and hvcC: NAL units of the packets have lengths of the size that the box says."""
    sequence, picture = H264_SETS
    box = b"\1\x4d\0\x1e\xfd\xe1" + len(sequence).to_bytes(2, "big") + sequence
    box += b"\1\0" + bytes([len(picture)]) + picture
    packet = memoryview(len(H264_IDR).to_bytes(2, "big") + H264_IDR)
    assert headers_of("h264", box).entry(packet)
    box = b"\1" + bytes(20) + b"\xfd\3"
    for unit in HEVC_SETS:
        box += bytes([unit[0] >> 1, 0, 1, 0, len(unit)]) + unit
    packet = memoryview(len(HEVC_CRA).to_bytes(2, "big") + HEVC_CRA)
    assert headers_of("hevc", box).entry(packet)


def test_the_first_packet_may_replace_what_the_container_says() -> None:
    other, second = b"\x68" + Writer().ue(0, 1).bytes(), b"\x68" + Writer().ue(1, 0).bytes()
    headers = headers_of("h264", bytes(start_codes(H264_SETS[0], other, second)))
    assert headers.entry(start_codes(*H264_SETS, H264_IDR))
    assert headers.entry(start_codes(H264_SETS[1], second, H264_IDR)), "the same as at the start"
    with pytest.raises(Unproven, match="change on the way"):
        headers.entry(start_codes(other, H264_IDR))


def test_decoders_that_are_not_known() -> None:
    with pytest.raises(Unproven, match="mpeg4"):
        headers_of("mpeg4", b"")


@pytest.mark.parametrize("decoder", HEADERS)
@given(data=st.data())
def test_any_bytes_are_taken_or_refused(decoder: str, data: st.DataObject) -> None:
    """Of what begins like a packet of the format too, with a byte changed or cut off."""
    parts = [bytes(packet) for _, packets, _ in PACKETS.values() for packet in packets]
    seeds = [bytes(packet) for name, packets, _ in PACKETS.values() if name == decoder for packet in packets]
    mangle: Callable[[bytes], st.SearchStrategy[bytes]] = lambda seed: st.tuples(  # noqa: E731
        st.integers(0, len(seed) - 1), st.binary(max_size=3), st.integers(1, len(seed))
    ).map(lambda cut: (seed[: cut[0]] + cut[1] + seed[cut[0] + len(cut[1]) :])[: cut[2]])
    bytes_like = st.one_of(st.binary(min_size=1), st.sampled_from(seeds).flatmap(mangle))
    try:
        headers: Headers = headers_of(decoder, data.draw(st.one_of(st.just(b""), st.binary(), st.sampled_from(parts))))
        for _ in range(2):
            assert isinstance(headers.entry(memoryview(data.draw(bytes_like))), bool)
    except Unproven as doubt:
        assert str(doubt)
