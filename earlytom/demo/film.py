"""A drawn clip as a video file, so that it goes the way of any other video: decoded, sampled, resized."""

from __future__ import annotations

from pathlib import Path

from ..errors import VideoError
from ..files import replacing
from ..video.source import import_av
from .draw import draw
from .world import SIZE, Clip

QUALITY = "8"  # x264's constant rate factor, where 18 looks lossless: 43 dB on clips without noise


def write_film(clip: Clip, path: Path, *, rate: int = 8) -> None:
    """Write a clip as MP4: H.264 of 384 x 384 pixels, `rate` frames a second; the same file for the same encoder.

    Raises VideoError when it cannot be written; what stood there before is there still.
    """
    av = import_av()
    if path.suffix != ".mp4":
        raise VideoError(f"{path}: a drawn clip is written as MP4, so its name must end in .mp4")
    try:
        with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": QUALITY})
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"  # what every player shows
            stream.codec_context.thread_count = 1  # threads change the bits
            for frame in range(clip.frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(clip, [frame])[0], format="rgb24")))
            container.mux(stream.encode())
    except (OSError, av.FFmpegError) as error:
        raise VideoError(f"{path}: the video cannot be written: {getattr(error, 'strerror', None) or error}") from None
