"""earlytom/video/: real clips, exact sampling, the SigLIP processor's pixels, and every way a file can be wrong."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import earlytom.video.reader as reader
import earlytom.video.resize as resize
from earlytom.errors import EarlyTomError, InputError, VideoError
from earlytom.video import read_frames, resize_frames, sample_indices
from earlytom.video.packets import Packets
from tests import clips

CODECS = (("libx264", "mp4"), ("libx264", "mkv"), ("libx264", "ts"), ("mpeg4", "avi"), ("libvpx-vp9", "webm"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.write(tmp_path_factory.mktemp("clip") / "pattern.mp4", clips.pattern(40))


def seen_indices(frames: NDArray[np.uint8], count: int) -> list[int]:
    """The index that each frame of `clips.pattern` shows by its brightness."""
    return ((frames.mean((1, 2, 3)) - 40) / 160 * (count - 1)).round().astype(int).tolist()


@given(count=st.integers(1, 5000), frames=st.integers(1, 128))
def test_sample_indices_are_the_released_ones(count: int, frames: int) -> None:
    indices = sample_indices(count, frames)
    assert indices.tolist() == np.linspace(0, count - 1, frames, dtype=int).tolist()
    assert indices.shape == (frames,) and indices[0] == 0 and (frames == 1 or indices[-1] == count - 1)
    assert len(set(indices.tolist())) == min(count, frames), "no frame is left out of a video that is too short"


@pytest.mark.parametrize(
    ("name", "count", "width", "height"),
    [("bikes", 250, 640, 272), ("bigbuckbunny", 132, 1280, 720), ("carphone", 120, 176, 144)],
)
def test_real_clips(name: str, count: int, width: int, height: int) -> None:
    path = clips.real(name)
    got = read_frames(path, frames=32)
    assert got.frames.shape == (32, 384, 384, 3) and got.frames.dtype == np.uint8
    assert (got.frame_count, got.width, got.height) == (count, width, height)
    assert got.indices.tolist() == np.linspace(0, count - 1, 32, dtype=int).tolist()
    assert got.timestamps == pytest.approx(got.indices / got.fps, abs=1e-3)
    assert got.duration == pytest.approx(count / got.fps, abs=1e-3)
    assert got.source == str(path) and got.decode_seconds > 0 and got.resize_seconds > 0
    assert got.frames.std((1, 2, 3)).min() > 5  # pictures, not blanks
    assert not got.damage and not got.repeated and got.notes == ()

    again = read_frames(str(path), frames=32)
    assert np.array_equal(got.frames, again.frames) and np.array_equal(got.timestamps, again.timestamps)


def test_the_frames_are_the_decoded_ones() -> None:
    """Against the plainest way: decode everything in one thread, pick, convert and resize."""
    import av
    from PIL import Image

    path = clips.real("carphone")
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    picked = [Image.fromarray(every[i]).resize((96, 96), Image.Resampling.BICUBIC) for i in sample_indices(120, 8)]
    assert np.array_equal(read_frames(path, frames=8, size=96).frames, np.stack([np.asarray(p) for p in picked]))


@pytest.mark.parametrize(("codec", "suffix"), CODECS)
def test_containers(tmp_path: Path, codec: str, suffix: str) -> None:
    path = clips.write(tmp_path / f"a b:ü.{suffix}", clips.pattern(40), codec=codec)  # a name FFmpeg could misread
    got = read_frames(path, frames=16, size=32)
    assert seen_indices(got.frames, 40) == got.indices.tolist() == np.linspace(0, 39, 16, dtype=int).tolist()
    assert got.timestamps[0] == 0 and got.timestamps == pytest.approx(got.indices / 25, abs=2e-3)
    assert got.fps == pytest.approx(25, abs=0.1) and got.duration == pytest.approx(1.6, abs=0.01)


def test_as_many_frames_as_there_are(clip: Path) -> None:
    assert seen_indices(read_frames(clip, frames=40, size=16).frames, 40) == list(range(40))
    assert read_frames(clip, frames=1, size=16).indices.tolist() == [0]


@pytest.mark.parametrize("guess", [0, 20, 39, 41, 90])
def test_packet_count_is_only_a_guess(clip: Path, monkeypatch: pytest.MonkeyPatch, guess: int) -> None:
    monkeypatch.setattr(reader, "read_packets", lambda file: Packets(guess, unproven="a guess"))
    got = read_frames(clip, frames=16, size=32)
    assert got.frame_count == 40 and seen_indices(got.frames, 40) == got.indices.tolist()
    short = read_frames(clip, frames=41, size=32)
    assert seen_indices(short.frames, 40) == np.linspace(0, 39, 41, dtype=int).tolist()
    with pytest.raises(VideoError, match="40 frames and 41"):
        read_frames(clip, frames=41, size=32, strict=True)


def test_batches_of_pending_frames_keep_order(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_frames(clip, frames=16, size=32).frames
    monkeypatch.setattr(resize, "PENDING_BYTES", 3 * 48 * 64 * 3)
    assert np.array_equal(read_frames(clip, frames=16, size=32).frames, whole)


def test_rotation_is_honoured(clip: Path, tmp_path: Path) -> None:
    plain = read_frames(clip, frames=4, size=48)
    turned = read_frames(clips.rotated(tmp_path / "rotated.mp4", clip), frames=4, size=48)
    assert (turned.width, turned.height) == (plain.height, plain.width) == (48, 64)
    upright = np.rot90(plain.frames, -1, axes=(1, 2)).astype(int)  # resized first, then turned: not quite the same
    assert np.abs(turned.frames.astype(int) - upright).mean() < 2


@pytest.mark.parametrize("shape", [(2, 272, 640, 3), (1, 100, 50, 3), (1, 721, 1283, 3), (3, 384, 384, 3)])
def test_resize_is_the_siglip_processor(shape: tuple[int, ...]) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    frames[:, : shape[1] // 2] = np.linspace(0, 255, shape[2]).astype(np.uint8)[None, None, :, None]
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    pixels = processor(list(frames), return_tensors="np")["pixel_values"]  # (x/255 - 0.5) / 0.5, [N, 3, H, W]
    theirs = (np.stack(list(pixels)) * 0.5 + 0.5).transpose(0, 2, 3, 1)
    assert np.abs(resize_frames(frames) / 255 - theirs).max() <= 1 / 255


def test_resize_of_a_real_clip_is_the_siglip_processor() -> None:
    import av
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    with av.open(str(clips.real("bikes"))) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    pixels = SiglipImageProcessorPil(size={"height": 384, "width": 384})([first], return_tensors="np")["pixel_values"]
    theirs = (pixels[0] * 0.5 + 0.5).transpose(1, 2, 0)
    ours = read_frames(clips.real("bikes"), frames=1).frames[0]
    assert np.abs(ours / 255 - theirs).max() <= 1 / 255


def test_resize_of_nothing_and_of_the_right_size() -> None:
    right = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(resize_frames(right, 16), right)
    assert resize_frames(np.zeros((0, 5, 7, 3), np.uint8), 16).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 0, 8, 3), np.uint8)]
)
def test_resize_refuses(frames: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match=r"frame 0 is .*: uint8 \[H, W, 3\] is needed"):
        resize_frames(frames)


def bad_file(kind: str, folder: Path, clip: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no video at all\n" * 100)
    elif kind == "audio":
        path = clips.write_audio(folder / "audio.wav")
    elif kind == "header":
        path.write_bytes(clip.read_bytes()[:40])
    elif kind == "cut":  # the index comes last and is lost
        clips.truncated(path, clip)
    elif kind == "cut-faststart":  # the index comes first, the frames are lost
        clips.truncated(path, clips.write(folder / "fast.mp4", clips.pattern(40), movflags="faststart"), 0.7)
    elif kind == "cut-avi":
        path = clips.truncated(folder / "cut.avi", clips.write(folder / "whole.avi", clips.pattern(40), codec="mpeg4"))
    elif kind == "damaged":
        clips.damaged(path, clip)
    elif kind == "damaged-ts":
        path = clips.damaged(folder / "bad.ts", clips.write(folder / "whole.ts", clips.pattern(40)))
    elif kind == "cut-mkv":
        path = clips.truncated(folder / "cut.mkv", clips.write(folder / "whole.mkv", clips.pattern(40)))
    elif kind == "zeroed-webm":
        path = clips.damaged(folder / "bad.webm", clips.write(folder / "whole.webm", clips.pattern(40), codec="libvpx"))
    elif kind == "overwritten-mpeg4":
        whole = clips.write(folder / "whole.mp4", clips.pattern(40), codec="mpeg4")
        path = clips.overwritten(folder / "overwritten.mp4", whole)
    elif kind == "overwritten-mjpeg":
        path = folder / "bad.avi"
        clips.overwritten(path, clips.write(folder / "mjpeg.avi", clips.pattern(40, 96, 128), codec="mjpeg"))
    elif kind == "zeroed-mpeg4":
        path = clips.damaged(folder / "bad.avi", clips.write(folder / "whole.avi", clips.pattern(40), codec="mpeg4"))
    elif kind == "playlist":
        path = folder / "list.m3u8"
        path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    elif kind == "long-name":
        path = folder / ("x" * 300)
    elif kind == "null-byte":
        path = folder / "a\0b"
    return path


HOPELESS = (
    ("missing", "there is no such file"),
    ("directory", "a directory"),
    ("empty", "0 bytes"),
    ("text", "not a video"),
    ("audio", r"no video stream in it \(only audio\)"),
    ("header", "not a video|no video stream"),
    ("cut", "cut off"),
    ("damaged", "damaged"),
    ("playlist", "not a video|no video stream|damaged|not one frame"),
    ("long-name", "cannot be read"),
    ("null-byte", "cannot be read|no such file"),
)
"""What no reading can help, whether it is strict or not."""
DAMAGED = (
    ("cut-faststart", r"cut off.*1 corrupt packet", 15),
    ("cut-avi", r"cut off.*1 corrupt packet, \d+ missing packets", 5),
    ("damaged-ts", r"damaged.*\d corrupt packets?", 30),
    ("cut-mkv", r"cut off.*1 error logged \(matroska,webm: File ended prematurely\)", 10),
    ("zeroed-webm", r"damaged.*1 error logged \(matroska,webm: 0x00 at pos", 15),
    ("overwritten-mpeg4", r"damaged.*\d corrupt frames?", 40),
    ("overwritten-mjpeg", r"damaged.*\d errors? logged \(mjpeg: ", 40),
    ("zeroed-mpeg4", r"damaged.*\d missing packets", 30),
)
"""Kind, what FFmpeg marks in it, how many of 40 frames decode at least."""


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("kind", "reason"), HOPELESS)
def test_bad_files(
    kind: str, reason: str, strict: bool, tmp_path: Path, clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(bad_file(kind, tmp_path, clip), reason, capfd, strict=strict)


@pytest.mark.parametrize(("kind", "marks", "least"), DAMAGED)
def test_damage_is_told_or_refused(
    kind: str, marks: str, least: int, tmp_path: Path, clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = bad_file(kind, tmp_path, clip)
    got = read_frames(path, frames=8, size=32)
    assert least <= got.frame_count <= 40 and got.frames.shape == (8, 32, 32, 3) and got.damage
    (note,) = got.notes
    assert str(path) in note and re.search(marks, note) and "\n" not in note
    refused(path, marks, capfd, strict=True)


def refused(path: Path, reason: str, capfd: pytest.CaptureFixture[str], *, strict: bool) -> None:
    capfd.readouterr()
    with pytest.raises(VideoError, match=reason) as caught:
        read_frames(path, frames=8, size=32, strict=strict)
    message = str(caught.value)
    assert (str(path) in message or repr(str(path))[1:-1] in message) and "\n" not in message and "Errno" not in message
    assert capfd.readouterr() == ("", "")  # FFmpeg keeps quiet


SOUND = {
    "b-frames.avi": ("mpeg4", {"bf": "2"}),
    "b-frames.ts": ("mpeg2video", {"bf": "2"}),
    "open-gop.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "altref.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "mjpeg.avi": ("mjpeg", {}),
    "msmpeg4.avi": ("msmpeg4", {}),
    "gif.gif": ("gif", {}),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_not_called_damaged(name: str, tmp_path: Path) -> None:
    codec, options = SOUND[name]
    path = clips.write(tmp_path / name, clips.pattern(40), codec=codec, encoder=options)
    got = read_frames(path, frames=16, size=32, strict=True)
    assert not got.damage and seen_indices(got.frames, 40) == got.indices.tolist()


def test_dropped_frames_of_an_avi_are_not_missing(tmp_path: Path) -> None:
    """A frame that lasts is followed by empty chunks, which the header counts and which are no packets."""
    times = [t for t in range(60) if t % 5 != 2][:40]
    path = clips.write(tmp_path / "vfr.avi", clips.pattern(40), codec="mpeg4", times=times)
    got = read_frames(path, frames=16, size=32, strict=True)
    assert got.frame_count == 40 and seen_indices(got.frames, 40) == got.indices.tolist()
    cut = read_frames(clips.truncated(tmp_path / "cut.avi", path), frames=16, size=32)
    assert cut.damage.missing > 10


def test_an_edit_list_leaves_packets_out_and_nothing_is_missing(clip: Path, tmp_path: Path) -> None:
    got = read_frames(clips.begun_late(tmp_path / "late.mp4", clip, 10), frames=30, size=32, strict=True)
    assert got.frame_count == 30 and seen_indices(got.frames, 40) == list(range(10, 40)), "from the middle of a GOP on"


def test_listening_leaves_the_logging_of_ffmpeg_as_it_was(tmp_path: Path, clip: Path) -> None:
    """Several readers at once, sound and damaged: each hears its own, and the one switch is put back by the last."""
    import av

    overwritten = bad_file("overwritten-mjpeg", tmp_path, clip)
    whole = clips.write(tmp_path / "whole.avi", clips.pattern(40), codec="mjpeg")
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda path: read_frames(path, frames=8, size=32), [overwritten, whole] * 6))
    assert not any(got.damage for got in read[1::2])
    assert {got.damage for got in read[::2]} == {read[0].damage} and read[0].damage.errors
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before


@pytest.mark.parametrize(("count", "frames"), [(31, 32), (5, 12), (1, 4)])
def test_a_short_video_repeats_frames_as_the_released_code_does(tmp_path: Path, count: int, frames: int) -> None:
    path = clips.write(tmp_path / "short.mp4", clips.pattern(40)[:count])
    got = read_frames(path, frames=frames, size=32)
    assert got.indices.tolist() == np.linspace(0, count - 1, frames, dtype=int).tolist()
    assert seen_indices(got.frames, 40) == got.indices.tolist()
    assert got.timestamps == pytest.approx(got.indices / 25, abs=2e-3)
    assert got.repeated == frames - count and not got.damage
    (note,) = got.notes
    assert f"{count} frame" in note and f"{frames} are needed" in note and f"{frames - count} " in note
    with pytest.raises(VideoError, match=rf"short\.mp4: the video has {count} frames? and {frames} are needed"):
        read_frames(path, frames=frames, size=32, strict=True)


IMAGES = (("a.jpg", 6), ("turned.jpg", 6), ("a.png", 0), ("a.webp", 6), ("a.bmp", 0))


@pytest.mark.parametrize(("name", "lossy"), IMAGES)
def test_an_image_is_a_video_of_one_frame(tmp_path: Path, name: str, lossy: int) -> None:
    from PIL import Image

    y, x = np.mgrid[:96, :128]
    picture = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[0x0112] = 6  # EXIF: turn a quarter to the right to see it upright
    picture.save(tmp_path / name, quality=95, exif=exif)
    upright = picture.rotate(-90, expand=True) if exif else picture
    got = read_frames(tmp_path / name, frames=3, size=32)
    assert (got.frame_count, got.repeated, got.width, got.height) == (1, 2, *upright.size)
    assert (got.frames == got.frames[0]).all()
    assert np.abs(got.frames[0].astype(int) - resize_frames([np.asarray(upright)], 32)[0]).max() <= lossy


@pytest.mark.parametrize("asked", [{"frames": 0}, {"frames": -1}, {"frames": 2, "size": 0}])
def test_bad_arguments(clip: Path, asked: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        read_frames(clip, **asked)


def test_importing_loads_nothing_heavy() -> None:
    program = "import sys, earlytom.video; print([name for name in ('av', 'PIL', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("package", ["av", "PIL"])
def test_missing_package_names_the_extra(clip: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EarlyTomError, match=r"pip install earlytom-export\[video\]"):
        read_frames(clip, frames=2, size=32)
