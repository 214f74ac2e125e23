"""Decoding a part of a file gives what decoding all of it gives, and where that is not certain all of it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import earlytom.video.decode as decode
import earlytom.video.packets as packets
import earlytom.video.reader as reader
from earlytom.errors import VideoError
from earlytom.video import VideoFrames, read_frames
from earlytom.video.headers import Unproven
from earlytom.video.packets import Packets, Timeline, check_order, most_reordered, read_packets
from earlytom.video.plan import plan_spans
from earlytom.video.source import open_video
from tests import clips

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

COUNT, GROUP, FRAMES = 64, 8, 4  # sampled: 0, 21, 42, 63
FAST = {"preset": "ultrafast", "g": str(GROUP), "bf": "0"}
REORDERED = FAST | {"bf": "3", "x264-params": "b-adapt=0:b-pyramid=normal:scenecut=0:ref=3"}
X265 = f"keyint={GROUP}:min-keyint={GROUP}:scenecut=0:bframes=3:b-adapt=0:log-level=none:pools=1:frame-threads=1"
VP9 = {"g": str(GROUP), "deadline": "realtime", "cpu-used": "8"}
VARIABLE = tuple(int(t) for t in np.cumsum(np.random.default_rng(0).integers(1, 5, COUNT)))

SOUGHT: dict[str, tuple[str, dict[str, str], tuple[int, ...] | None]] = {
    "plain.mp4": ("libx264", FAST, None),
    "b-frames.mp4": ("libx264", REORDERED, None),
    "b-frames.mkv": ("libx264", REORDERED, None),
    "b-frames.ts": ("libx264", REORDERED, None),
    "slices.flv": ("libx264", REORDERED | {"slices": "3"}, None),
    "variable.mp4": ("libx264", REORDERED, VARIABLE),
    "variable.mkv": ("libx264", REORDERED, VARIABLE),
    "late.mp4": ("libx264", REORDERED, tuple(range(50, 50 + COUNT))),
    "late.mkv": ("libx264", REORDERED, tuple(range(50, 50 + COUNT))),
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=0"}, None),
    "hevc-open-gop.mp4": ("libx265", {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=1"}, None),
    "hevc-open-gop.ts": ("libx265", {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=1"}, None),
    "vp9.webm": ("libvpx-vp9", VP9, None),
    "vp9-hidden.webm": ("libvpx-vp9", VP9 | {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "6"}, None),
    "av1.mp4": ("libsvtav1", {"g": str(GROUP), "preset": "12", "svtav1-params": "lp=1"}, None),
    "mjpeg.avi": ("mjpeg", {}, None),
    "mjpeg.mkv": ("mjpeg", {}, VARIABLE),
}
"""Name of a file: codec, its options, times of the frames."""

DECODED_WHOLE = {
    "open-gop.mp4": ("libx264", {"x264-params": f"open-gop=1:keyint={GROUP}:bframes=3:scenecut=0"}, "most of it"),
    "open-gop.ts": ("libx264", {"x264-params": f"open-gop=1:keyint={GROUP}:bframes=3:scenecut=0"}, "most of it"),
    "intra-refresh.ts": ("libx264", {"x264-params": f"intra-refresh=1:keyint={GROUP}"}, "most of it"),
    "one-group.mp4": ("libx264", FAST | {"g": "250"}, "most of it"),
    "interlaced.mp4": ("libx264", FAST | {"x264-params": "tff=1"}, "interlaced"),
    "mpeg4.avi": ("mpeg4", {"g": str(GROUP), "bf": "2"}, "mpeg4 is not a decoder that is known"),
    "mpeg4.mp4": ("mpeg4", {"g": str(GROUP)}, "mpeg4 is not a decoder that is known"),
    "mpeg2.ts": ("mpeg2video", {"g": str(GROUP), "bf": "2"}, "mpeg2video is not a decoder that is known"),
    "vp8.webm": ("libvpx", VP9, "vp8 is not a decoder that is known"),
}


def write(folder: Path, name: str, codec: str, encoder: dict[str, str], times: tuple[int, ...] | None = None) -> Path:
    return clips.write(folder / name, clips.pattern(COUNT, 64, 64), codec=codec, encoder=encoder, times=times)


def same_as_all(path: Path) -> VideoFrames:
    """Read as usual, and find that it gives what decoding everything gives."""
    got, whole = (read_frames(path, frames=FRAMES, size=32, strict=strict) for strict in (False, True))
    assert whole.decoded == COUNT and whole.whole
    for field in fields(VideoFrames):
        if field.name not in ("decoded", "whole", "decode_seconds", "resize_seconds"):
            assert np.array_equal(getattr(got, field.name), getattr(whole, field.name)), field.name
    return got


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound"), "sound.mp4", "libx264", REORDERED)


@pytest.mark.parametrize("name", SOUGHT)
def test_a_part_gives_the_same_frames(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, name, *SOUGHT[name])
    monkeypatch.setattr(decode, "NEAR", 0)  # seeks although the file is short
    got = same_as_all(path)
    assert got.whole == "" and got.indices.tolist() == [0, 21, 42, 63] and not got.damage
    assert FRAMES <= got.decoded <= 3 * COUNT // 4
    if "mjpeg" in name:
        assert got.decoded == FRAMES
    monkeypatch.setattr(decode, "NEAR", COUNT)  # reads on instead
    read_on = read_frames(path, frames=FRAMES, size=32)
    assert read_on.decoded == got.decoded and np.array_equal(read_on.frames, got.frames)


@pytest.mark.parametrize("name", DECODED_WHOLE)
def test_all_is_decoded_where_a_part_is_not_certain(name: str, tmp_path: Path) -> None:
    codec, encoder, why = DECODED_WHOLE[name]
    got = same_as_all(write(tmp_path, name, codec, encoder))
    assert why in got.whole and got.decoded == COUNT


def test_timestamps_that_are_made_up_are_found_out(tmp_path: Path) -> None:
    """AVI has none: with B-frames, FFmpeg's are those of decoding."""
    got = same_as_all(write(tmp_path, "b-frames.avi", "libx264", REORDERED))
    assert "other frames come out" in got.whole and COUNT < got.decoded < 2 * COUNT, "tried, and then all decoded"


@pytest.mark.parametrize("name", ["bikes", "carphone"])
@pytest.mark.parametrize("frames", [1, 3])
def test_real_clips(name: str, frames: int) -> None:
    got, whole = (read_frames(clips.real(name), frames=frames, size=64, strict=strict) for strict in (False, True))
    assert np.array_equal(got.frames, whole.frames) and np.array_equal(got.timestamps, whole.timestamps)
    assert got.whole or got.decoded < whole.decoded
    assert got.decoded == 1 or frames > 1, "the first frame alone needs no other"


def test_rotation_is_honoured(sound: Path, tmp_path: Path) -> None:
    got = same_as_all(clips.rotated(tmp_path / "rotated.mp4", sound))
    assert got.whole == "" and (got.width, got.height) == (64, 64)


def test_an_edit_list_that_leaves_packets_out(sound: Path, tmp_path: Path) -> None:
    got = read_frames(clips.begun_late(tmp_path / "late.mp4", sound, 10), frames=FRAMES, size=32)
    assert "edit list" in got.whole and got.frame_count == COUNT - 10


def damaged_at(path: Path, source: Path, packet: int) -> Path:
    return clips.overwritten(path, source, [packet])


@pytest.mark.parametrize(
    ("suffix", "options"), [("mp4", {"movflags": "frag_keyframe+empty_moov"}), ("mkv", {"live": "1"})]
)
def test_files_without_an_index(
    suffix: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "NEAR", 0)
    path = tmp_path / f"live.{suffix}"
    got = same_as_all(clips.write(path, clips.pattern(COUNT), encoder=REORDERED, **options))
    assert got.whole == "" and got.decoded < COUNT


def test_a_container_that_cannot_seek_is_read_on(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    class Unseekable:
        def __init__(self, container: InputContainer) -> None:
            self.demux, self.decode = container.demux, container.decode

        def seek(self, *_: object, **__: object) -> None:
            raise av.FFmpegError(1, "Operation not permitted")

    @contextmanager
    def open_unseekable(file: Path, doing: str) -> Iterator[tuple[Unseekable, VideoStream]]:
        with open_video(file, doing) as (container, stream):
            yield Unseekable(container), stream

    right = read_frames(sound, frames=FRAMES, size=32)
    monkeypatch.setattr(decode, "NEAR", 0)
    monkeypatch.setattr(decode, "open_video", open_unseekable)
    got = read_frames(sound, frames=FRAMES, size=32)
    assert got.whole == "" and got.decoded == right.decoded and np.array_equal(got.frames, right.frames)


def test_damage_where_a_frame_is_needed_is_told(sound: Path, tmp_path: Path) -> None:
    """Packet 18 is of the third group, which frame 21 is decoded from."""
    path = damaged_at(tmp_path / "damaged.mp4", sound, 18)
    got = read_frames(path, frames=FRAMES, size=32)
    assert got.damage.frames and "damaged" in got.whole and got.decoded > COUNT, "it was tried, and then all decoded"
    with pytest.raises(VideoError, match=r"damaged.*corrupt frame"):
        read_frames(path, frames=FRAMES, size=32, strict=True)


def test_damage_elsewhere_changes_nothing_and_is_refused_by_strict_reading(sound: Path, tmp_path: Path) -> None:
    """Packet 26 is of the fourth group, which no frame is sampled from."""
    path = damaged_at(tmp_path / "damaged.mp4", sound, 26)
    got, right = (read_frames(each, frames=FRAMES, size=32) for each in (path, sound))
    assert np.array_equal(got.frames, right.frames) and not got.damage and got.whole == ""
    with pytest.raises(VideoError, match=r"damaged.*corrupt frame"):
        read_frames(path, frames=FRAMES, size=32, strict=True)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("harm", [clips.truncated, clips.damaged])
def test_files_that_are_cut_off_or_zeroed_are_decoded_whole(
    harm: Callable[[Path, Path], Path], suffix: str, tmp_path: Path
) -> None:
    """Or refused, where nothing can be read."""
    whole = clips.write(tmp_path / f"whole.{suffix}", clips.pattern(COUNT), encoder=FAST, movflags="faststart")
    try:
        got = read_frames(harm(tmp_path / f"harmed.{suffix}", whole), frames=FRAMES, size=32)
    except VideoError as error:
        assert "damaged" in str(error)
    else:
        assert got.whole and got.damage


def altered(change: Callable[[Timeline], Timeline]) -> Callable[[Path], Packets]:
    def read(path: Path) -> Packets:
        found = read_packets(path)
        assert found.timeline is not None
        return replace(found, timeline=change(found.timeline))

    return read


ALTERED = {
    "size of an entry": (lambda t: replace(t, sizes=t.sizes + (np.arange(COUNT) == 16)), "does not find a packet"),
    "size of another": (lambda t: replace(t, sizes=t.sizes + (np.arange(COUNT) == 17)), "gives other packets"),
    "no key frame": (lambda t: replace(t, entries=np.sort(np.append(t.entries, [17, 41]))), "come out|is damaged"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_all_is_decoded_when_the_file_is_not_what_was_read(
    what: str, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, why = ALTERED[what]
    right = read_frames(sound, frames=FRAMES, size=32)
    monkeypatch.setattr(reader, "read_packets", altered(change))
    got = read_frames(sound, frames=FRAMES, size=32)
    assert got.decoded >= COUNT
    assert any(reason in got.whole for reason in why.split("|"))
    assert np.array_equal(got.frames, right.frames)


def test_an_older_pyav_decodes_all(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "shows_side_data", lambda: False)
    got = read_frames(sound, frames=FRAMES, size=32)
    assert "PyAV before 16" in got.whole and got.decoded == COUNT


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Groups of 1 to 9 packets, each with its entry first; in an open group, some are shown before the entry."""
    pts: list[int] = []
    entries = []
    for group in range(draw(st.integers(1, 6))):
        size, entry = draw(st.integers(1, 9)), len(pts)
        shown = draw(st.permutations(range(size)))
        if group == 0 or draw(st.booleans()):
            shown = [0, *(t for t in shown if t)]
        entries.append(entry)
        pts += [entry + t for t in shown]
    spread = draw(st.integers(1, 3))
    numbers = np.array(pts, np.int64) * spread - 7
    return Timeline(numbers, numbers, np.ones_like(numbers), np.array(entries, np.int64), Fraction(1, 25))


@given(timelines(), st.data())
def test_spans_hold_what_the_wanted_frames_need_and_no_more(timeline: Timeline, data: st.DataObject) -> None:
    pts, entries = timeline.pts, timeline.entries.tolist()
    check_order(pts, timeline.entries, closed=False)
    shown = np.sort(pts)
    wanted = sorted(data.draw(st.sets(st.integers(0, len(pts) - 1), min_size=1)))
    spans = plan_spans(timeline, wanted)
    for index in wanted:
        (span,) = (s for s in spans if s.index <= index < s.index + len(s.shown))
        packet = pts.tolist().index(shown[index])
        enough = [e for e in entries if e <= packet and pts[e] <= shown[index]]
        assert span.first <= max(enough) and packet <= span.last
    for span, following in zip(spans, [*spans[1:], None]):
        assert span.first in entries and (following is None or span.last + 1 < following.first)
        assert np.array_equal(span.shown, shown[span.index : span.index + len(span.shown)])
        assert span.shown[0] == pts[span.first] and span.index + len(span.shown) - 1 in wanted
        inside = pts[span.first : span.last + 1]
        assert set(span.shown.tolist()) <= set(inside.tolist())
        assert inside[-1] <= span.shown[-1], "the last packet is needed"


@pytest.mark.parametrize(
    ("pts", "entries", "closed", "why"),
    [
        ([0, 1, 1, 2], [0], True, "same timestamp"),
        ([0, 1, 2], [], True, "cannot begin"),
        ([0, 1, 2], [1], True, "cannot begin"),
        ([1, 0, 2], [0], False, "cannot begin"),
        ([0, 5, 3, 4], [0, 2], True, "contradict"),
        ([0, 1, 3, 2], [0, 2], True, "contradict"),
    ],
)
def test_orders_that_prove_nothing(pts: list[int], entries: list[int], closed: bool, why: str) -> None:
    with pytest.raises(Unproven, match=why):
        check_order(np.array(pts), np.array(entries, np.int64), closed=closed)
    check_order(np.array([0, 1, 3, 2, 4]), np.array([0, 2]), closed=False)


@given(st.permutations(range(12)))
def test_packets_to_wait_for(pts: list[int]) -> None:
    waiting = [sum(earlier > now for earlier in pts[:i]) for i, now in enumerate(pts)]
    assert most_reordered(np.array(pts)) == max(waiting)
