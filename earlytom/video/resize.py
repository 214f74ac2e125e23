"""Frames of any size to the square that SigLIP sees: bicubic, no crop, as its image processor resizes them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, VideoError

PENDING_BYTES = 64 * 2**20
"""Full-size RGB held before it is resized: ten 1080p frames, two or three 4K ones."""
WORKERS = 8


def resize_frames(frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], size: int = 384) -> NDArray[np.uint8]:
    """Frames uint8 [H, W, 3], sizes may differ, or an array of them → uint8 [N, size, size, 3], bicubic, no crop.

    Frames that have the size already keep their values. Pillow lets threads run side by side.

    Raises:
        InputError: not uint8 frames of that shape, an empty side, or a size below 1.
        VideoError: Pillow is not installed.
    """
    for i, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
            raise InputError(f"frame {i} is {frame.dtype} {list(frame.shape)}: uint8 [H, W, 3] is needed")
    if size < 1:
        raise InputError(f"size is {size}: at least 1 pixel is needed")
    image = import_pillow().Image
    result = np.empty((len(frames), size, size, 3), dtype=np.uint8)

    def one(index: int) -> None:
        picture = image.fromarray(np.ascontiguousarray(frames[index]))
        result[index] = picture.resize((size, size), resample=image.Resampling.BICUBIC)

    workers = min(len(frames), WORKERS, os.cpu_count() or 1)
    if workers <= 1:
        for index in range(len(frames)):
            one(index)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(len(frames))))
    return result


class Resizer:
    """Resizes one frame after the other in threads, while the caller decodes the next; results keep the order.

    At most PENDING_BYTES of frames, or a single one, are held: beyond that, `add` waits for the oldest. What a thread
    raises is raised by a later `add` or by `results`. Leaving the block ends the threads.

    `waited`: seconds for which the caller has been kept waiting.
    """

    def __init__(self, size: int) -> None:
        self.waited = 0.0
        self._size = size
        self._done: list[NDArray[np.uint8]] = []
        self._pending: deque[tuple[Future[NDArray[np.uint8]], int]] = deque()
        self._pool = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1), thread_name_prefix="resize")

    def __enter__(self) -> Resizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, frame: NDArray[np.uint8]) -> None:
        """A frame uint8 [H, W, 3], which must not change any more."""
        while self._pending and self._held() + frame.nbytes > PENDING_BYTES:
            self._take_oldest()
        while self._pending and self._pending[0][0].done():
            self._take_oldest()
        self._pending.append((self._pool.submit(resize_frames, [frame], self._size), frame.nbytes))

    def results(self) -> list[NDArray[np.uint8]]:
        """uint8 [1, size, size, 3] of each frame, in the order in which they came."""
        while self._pending:
            self._take_oldest()
        return self._done

    def _held(self) -> int:
        return sum(size for _, size in self._pending)

    def _take_oldest(self) -> None:
        started = time.perf_counter()
        self._done.append(self._pending[0][0].result())
        self._pending.popleft()
        self.waited += time.perf_counter() - started


def import_pillow() -> Any:
    """The package PIL with what this project uses of it."""
    try:
        import PIL.Image
        import PIL.ImageChops
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise VideoError(
            f"resizing frames needs Pillow ({error}): install it with `pip install earlytom-export[video]`"
        ) from error
    return PIL
