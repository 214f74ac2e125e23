"""earlytom/video/: real clips, exact sampling, the SigLIP processor's pixels, and every way a file can be wrong."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import earlytom.video.reader as reader
from earlytom.errors import EarlyTomError, InputError, VideoError
from earlytom.video import read_frames, resize_frames, sample_indices
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
    if count < frames:
        with pytest.raises(InputError, match=f"ask for {count} or fewer"):
            sample_indices(count, frames)
        return
    indices = sample_indices(count, frames)
    assert indices.tolist() == np.linspace(0, count - 1, frames, dtype=int).tolist()
    assert indices.shape == (frames,) and indices[0] == 0 and (frames == 1 or indices[-1] == count - 1)
    assert (np.diff(indices) > 0).all()


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
    monkeypatch.setattr(reader, "_count_packets", lambda file: guess)
    got = read_frames(clip, frames=16, size=32)
    assert got.frame_count == 40 and seen_indices(got.frames, 40) == got.indices.tolist()
    with pytest.raises(VideoError, match="40 frames and 41"):
        read_frames(clip, frames=41, size=32)


def test_batches_of_pending_frames_keep_order(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_frames(clip, frames=16, size=32).frames
    monkeypatch.setattr(reader, "PENDING_BYTES", 3 * 48 * 64 * 3)
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
    right = np.zeros((2, 16, 16, 3), np.uint8)
    assert resize_frames(right, 16) is right
    assert resize_frames(np.zeros((0, 5, 7, 3), np.uint8), 16).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 0, 8, 3), np.uint8)]
)
def test_resize_refuses(frames: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match=r"uint8 \[N, H, W, 3\] is needed"):
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
    elif kind == "playlist":
        path = folder / "list.m3u8"
        path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    elif kind == "long-name":
        path = folder / ("x" * 300)
    elif kind == "null-byte":
        path = folder / "a\0b"
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "there is no such file"),
        ("directory", "a directory"),
        ("empty", "0 bytes"),
        ("text", "not a video"),
        ("audio", r"no video stream in it \(only audio\)"),
        ("header", "not a video|no video stream"),
        ("cut", "cut off"),
        ("cut-faststart", "cut off"),
        ("cut-avi", "cut off"),
        ("damaged", "damaged"),
        ("damaged-ts", "damaged"),
        ("playlist", "not a video|no video stream|damaged|not one frame"),
        ("long-name", "cannot be read"),
        ("null-byte", "cannot be read|no such file"),
    ],
)
def test_bad_files(kind: str, reason: str, tmp_path: Path, clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = bad_file(kind, tmp_path, clip)
    capfd.readouterr()
    with pytest.raises(VideoError, match=reason) as caught:
        read_frames(path, frames=8, size=32)
    message = str(caught.value)
    assert (str(path) in message or repr(str(path))[1:-1] in message) and "\n" not in message and "Errno" not in message
    assert capfd.readouterr() == ("", "")  # FFmpeg keeps quiet


def test_too_short(clip: Path) -> None:
    with pytest.raises(VideoError, match=r"pattern\.mp4: the video has 40 frames and 64 are needed: .*at most 40"):
        read_frames(clip, frames=64, size=32)


@pytest.mark.parametrize("asked", [{"frames": 0}, {"frames": -1}, {"frames": 2, "size": 0}])
def test_bad_arguments(clip: Path, asked: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        read_frames(clip, **asked)


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
