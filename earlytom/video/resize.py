"""Frames of any size to the square that SigLIP sees: bicubic, no crop, as its image processor resizes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, VideoError


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

    workers = min(len(frames), 8, os.cpu_count() or 1)
    if workers <= 1:
        for index in range(len(frames)):
            one(index)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(len(frames))))
    return result


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
