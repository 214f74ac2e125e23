"""Videos read in other processes: the same frames in the same order, errors among them, and nobody left running."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from earlytom.errors import VideoError
from earlytom.video import VideoFrames, read_frames
from earlytom.video.ahead import read_ahead
from tests import clips


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = [clips.write(folder / f"{count}.mp4", clips.pattern(count)) for count in (9, 7)]
    (folder / "bad.mp4").write_bytes(b"no video")
    return [paths[0], folder / "bad.mp4", paths[1], paths[0]]


def check(found: list[VideoFrames | VideoError], videos: list[Path]) -> None:
    assert len(found) == len(videos)
    for read, path in zip(found, videos):
        if path.name == "bad.mp4":
            assert isinstance(read, VideoError) and str(path) in str(read)
        else:
            assert isinstance(read, VideoFrames)
            assert np.array_equal(read.frames, read_frames(path, frames=4, size=32).frames)


def test_here(videos: list[Path]) -> None:
    check(list(read_ahead(videos, frames=4, size=32, workers=0)), videos)
    assert list(read_ahead([], frames=4, size=32, workers=0)) == []
    (strict,) = read_ahead(videos[2:3], frames=8, size=32, strict=True, workers=0)
    assert isinstance(strict, VideoError) and "8 are needed" in str(strict)


def test_in_other_processes_one_of_which_dies(videos: list[Path]) -> None:
    reading = read_ahead(videos[:3], frames=4, size=32, workers=1)
    first = next(reading)
    (process,) = multiprocessing.active_children()
    process.kill()  # while it has the second, or waits to hand it over
    process.join()
    second = next(reading)
    assert isinstance(second, VideoError)
    assert "died (exit status -9)" in str(second) or "FFmpeg can open" in str(second)
    check([first, second, next(reading)], videos[:3])
    reading.close()
    assert not multiprocessing.active_children()
