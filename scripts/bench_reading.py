"""Time reading a few frames of a long video against decoding all of it: `python -m scripts.bench_reading --minutes 60`.

The video is made here: 720p H.264 with key frames every two seconds, in which textures move over each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from engines.command import Parser, at_least, guarded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RATE = 24
KEY_SECONDS = 2
SCENE = 10 * RATE  # frames, then a cut
BIT_RATE = 2_000_000  # of video on the web at 720p


def parser() -> Parser:
    made = Parser("bench_reading", "Time reading a few frames of a long video against decoding all of it.")
    add = made.add_argument
    add("--minutes", type=at_least(1), default=60, metavar="N", help="length of the video (default %(default)s)")
    add("--height", type=at_least(16), default=720, metavar="N", help="pixels, 16:9 (default %(default)s)")
    add("--frames", type=at_least(1), default=32, metavar="N", help="frames to sample (default %(default)s)")
    add("--runs", type=at_least(1), default=3, metavar="N", help="readings of those (default %(default)s)")
    add("--video", type=Path, metavar="OUT.mp4", help="keep the video here, or read the one that is here")
    add("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 with one sentence on an error or when the frames differ, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    return guarded("bench_reading", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    with _video(arguments) as (path, encoding):
        found = bench_reading(path, frames=arguments.frames, runs=arguments.runs) | {"encode_seconds": encoding}
    text = json.dumps(found, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if found["equal"] else 1


@contextmanager
def _video(arguments: argparse.Namespace) -> Iterator[tuple[Path, float | None]]:
    """The video to read, and seconds that making it took, None where it was there."""
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.video or Path(folder) / "long.mp4"
        if path.exists():
            yield path, None
            return
        started = time.perf_counter()
        write_long_video(path, arguments.minutes * 60 * RATE, arguments.height)
        yield path, round(time.perf_counter() - started, 3)


def bench_reading(path: Path, *, frames: int, runs: int) -> dict[str, Any]:
    """Read `frames` frames of a video once by decoding all of it, then `runs` times as usual; plain JSON.

    {"whole", "sampled": seconds and decoded frames of each way, "speedup": whole by the median of sampled, "equal":
    whether frames, positions and times are the same bit for bit, "whole_because": why sampling decoded all, else empty,
    ...}. All of it is decoded by strict reading, which is the same code with the same resizing. The file comes from the
    system's cache where it fits: the first reading of a video just made finds it there too.
    """
    import numpy as np

    from earlytom.video import read_frames
    from earlytom.video.source import import_av
    from engines.measure.machine import describe_machine

    def timed(strict: bool) -> tuple[Any, float]:
        started = time.perf_counter()
        read = read_frames(path, frames=frames, strict=strict)
        return read, time.perf_counter() - started

    whole, whole_seconds = timed(strict=True)
    sampled, seconds = zip(*(timed(strict=False) for _ in range(runs)))
    equal = all(
        np.array_equal(getattr(whole, name), getattr(read, name))
        for read in sampled
        for name in ("frames", "indices", "timestamps", "frame_count", "fps", "duration", "width", "height")
    )
    return {
        "video": {
            "frames": whole.frame_count, "seconds": round(whole.duration, 2), "bytes": path.stat().st_size,
            "width": whole.width, "height": whole.height,
        },
        "sampled_frames": frames,
        "whole": {"seconds": round(whole_seconds, 3), "decoded": whole.decoded},
        "sampled": {
            "seconds": [round(value, 3) for value in seconds], "median_seconds": round(median(seconds), 3),
            "decoded": sampled[0].decoded, "waited_for_resizing": round(sampled[0].resize_seconds, 3),
        },
        "speedup": round(whole_seconds / median(seconds), 2),
        "equal": equal,
        "whole_because": sampled[0].whole,
        "ffmpeg": {name: ".".join(map(str, version)) for name, version in import_av().library_versions.items()},
        "machine": describe_machine(),
    }


def write_long_video(path: Path, frames: int, height: int) -> None:
    """H.264 with key frames every two seconds, as fast as x264 can; what is interrupted leaves no file."""
    from earlytom.errors import VideoError
    from earlytom.files import replacing
    from earlytom.video.source import import_av

    av = import_av()
    height -= height % 4
    width = height * 16 // 9 // 4 * 4
    options = {
        "preset": "ultrafast", "bf": "2", "g": str(KEY_SECONDS * RATE), "keyint_min": str(KEY_SECONDS * RATE),
        "sc_threshold": "0",
    }
    try:
        with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=RATE, options=options)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", BIT_RATE
            for picture in moving_textures(frames, height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
            container.mux(stream.encode())
    except (OSError, av.FFmpegError) as error:
        raise VideoError(f"{path}: the video cannot be written: {getattr(error, 'strerror', None) or error}") from None


def moving_textures(frames: int, height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    """uint8 [height * 3 / 2, width] each, YUV 4:2:0: two textures that move across each other; a cut every ten s."""
    import numpy as np

    generator = np.random.default_rng(0)
    plane = height * 3 // 2
    layers = [_texture(generator, 2 * plane, 2 * width) for _ in range(2)]
    for t in range(frames):
        if t % SCENE == 0:
            starts = generator.integers(0, [plane, width], (2, 2))
            steps = generator.integers(-3, 4, (2, 2))
        windows = []
        for layer, start, step in zip(layers, starts, steps):
            y, x = (start + step * (t % SCENE)) % (plane, width)
            windows.append(layer[y : y + plane, x : x + width])
        yield np.maximum(*windows)


def _texture(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth noise of several scales."""
    import numpy as np

    from earlytom.video.resize import import_pillow

    image = import_pillow().Image
    total = np.zeros((height, width), np.float32)
    for scale in (4, 16, 64):
        coarse = generator.integers(0, 256, (height // scale + 2, width // scale + 2), dtype=np.uint8)
        fine = image.fromarray(coarse).resize((width, height), resample=image.Resampling.BICUBIC)
        total += np.asarray(fine, np.float32) * (scale / 84)
    return total.astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
