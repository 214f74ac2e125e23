"""The clips that a bundle is verified on: those of a video, or made-up ones with scenes, drift and cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .reader import read_frames

SCENE_FRAMES = 9  # long enough that max_window, not the cut, ends some of the segments


def synthetic_clip(frames: int, size: int = 384, *, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [frames, size, size, 3]: textured scenes in which a disc moves, the light drifts and the camera pans.

    The same numbers for the same arguments on every machine. Between two frames of a scene a little or a lot changes,
    so that every branch of the merging is taken.
    """
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    clip = np.empty((frames, size, size, 3), np.uint8)
    for t in range(frames):
        if t % SCENE_FRAMES == 0:
            waves = generator.uniform(2, 14, (3, 2)).astype(np.float32)
            phase = generator.uniform(0, 6.28, 3).astype(np.float32)
            grain = generator.integers(-24, 25, (size, size, 3), dtype=np.int16)
            centre, step, light, pan = generator.uniform(0.2, 0.8, 2), generator.uniform(-0.06, 0.06, 2), 1.0, 0.0
            colour = generator.uniform(60, 255, 3)
        pace = generator.choice([0.1, 0.5, 2.0])
        centre, pan = centre + pace * step, pan + 0.008 * pace
        light = light + float(generator.normal(0, 0.02 * pace))
        background = np.stack(
            [127 + 90 * np.sin(wx * 6.28 * (x + pan) + wy * 6.28 * y + p) for (wx, wy), p in zip(waves, phase)], axis=-1
        )
        disc = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.03)[..., None]
        clip[t] = np.clip(np.where(disc, colour, background) * light + grain, 0, 255).astype(np.uint8)
    return clip


def verification_clips(
    video: Path | None, *, frames: int, size: int, batch: int, tell: Callable[[str], None] | None = None
) -> NDArray[np.uint8]:
    """uint8 [batch, frames, size, size, 3]: the video once for each of the batch, or synthetic clips that differ.

    tell: is given what a person should know of the video's frames, line by line.
    """
    if video is not None:
        read = read_frames(video, frames=frames, size=size)
        if tell is not None:
            for line in read.notes:
                tell(line)
        return np.stack([read.frames] * batch)
    return np.stack([synthetic_clip(frames, size, seed=v) for v in range(batch)])
