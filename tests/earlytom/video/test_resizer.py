"""Resizing beside decoding: the order is kept, memory bounded, and what goes wrong in a thread is raised."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray

import earlytom.video.decode as decode
import earlytom.video.resize as resize
from earlytom.errors import InputError
from earlytom.video import read_frames, resize_frames
from earlytom.video.resize import Resizer
from tests import clips

FRAMES = [np.full((6 + i, 8, 3), 20 * i, np.uint8) for i in range(12)]
ALL_BUT_ONE = sum(frame.nbytes for frame in FRAMES) - 1


@pytest.mark.parametrize("limit", [1, 500, ALL_BUT_ONE, 10**9])
def test_results_keep_the_order(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "PENDING_BYTES", limit)
    with Resizer(4) as resizer:
        for frame in FRAMES:
            resizer.add(frame)
        assert np.array_equal(np.concatenate(resizer.results()), resize_frames(FRAMES, 4))
    assert resizer.waited > 0


def test_no_more_frames_are_held_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are held back until the third `add` has to wait for the first one."""
    size = FRAMES[-1].nbytes
    monkeypatch.setattr(resize, "PENDING_BYTES", 2 * size)
    allowed, added = threading.Semaphore(0), threading.Semaphore(0)

    def slowly(frames: list[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
        allowed.acquire()
        return resize_frames(frames, side)

    monkeypatch.setattr(resize, "resize_frames", slowly)
    with Resizer(4) as resizer:

        def add_three() -> None:
            for _ in range(3):
                resizer.add(FRAMES[-1])
                added.release()

        adding = threading.Thread(target=add_three)
        adding.start()
        assert added.acquire(timeout=60) and added.acquire(timeout=60)
        assert not added.acquire(timeout=0.2), "the third has to wait"
        for _ in range(3):
            allowed.release()
        assert added.acquire(timeout=60)
        adding.join()
        assert len(resizer.results()) == 3


def test_what_a_thread_raises_is_raised() -> None:
    with pytest.raises(InputError, match=r"uint8 \[H, W, 3\]"), Resizer(4) as resizer:
        for frame in (FRAMES[0], np.zeros((0, 4, 3), np.uint8), *FRAMES):
            resizer.add(frame)
        resizer.results()
    assert not any(thread.name.startswith("resize") for thread in threading.enumerate())


def test_a_failure_beside_decoding_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(frames: list[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
        raise MemoryError("as much as that")

    monkeypatch.setattr(resize, "resize_frames", fail)
    with pytest.raises(MemoryError, match="as much as that"):
        read_frames(clips.real("carphone"), frames=2, size=16)
    assert decode.Resizer is Resizer and not any(t.name.startswith("resize") for t in threading.enumerate())
