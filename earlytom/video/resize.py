"""Frames of any size to the square that SigLIP sees: bicubic, no crop, as its image processor resizes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, VideoError


def resize_frames(frames: NDArray[np.uint8], size: int = 384) -> NDArray[np.uint8]:
    """Frames uint8 [N, H, W, 3] → uint8 [N, size, size, 3], bicubic, no crop, as SigLIP's processor resizes them.

    Frames that have the size already are returned as they are (the same memory).

    Raises:
        InputError: not a uint8 array of that shape, an empty side, or a size below 1.
        VideoError: Pillow is not installed.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape[1:3]:
        raise InputError(f"frames are {frames.dtype} {list(frames.shape)}: uint8 [N, H, W, 3] is needed")
    if size < 1:
        raise InputError(f"size is {size}: at least 1 pixel is needed")
    if frames.shape[1:3] == (size, size):
        return frames
    return resize_each(list(frames), size)


def resize_each(frames: Sequence[NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    """Frames uint8 [H, W, 3], sizes may differ → uint8 [N, size, size, 3]; Pillow lets threads run side by side."""
    image = import_pillow()
    result = np.empty((len(frames), size, size, 3), dtype=np.uint8)

    def one(index: int) -> None:
        picture = image.fromarray(np.ascontiguousarray(frames[index]))
        result[index] = picture.resize((size, size), resample=image.Resampling.BICUBIC)

    workers = min(len(frames), 8, os.cpu_count() or 1)
    if workers <= 1:
        for index in range(len(frames)):
            one(index)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(len(frames))))
    return result


def import_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise VideoError(
            f"resizing frames needs Pillow ({error}): install it with `pip install earlytom-export[video]`"
        ) from error
    return Image
