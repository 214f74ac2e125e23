"""Paints clips of the small world: uint8 frames, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .world import RADIUS, WHOLE, Clip, Field, Scene, Thing

RGB = {
    "red": (215, 35, 40), "green": (35, 165, 60), "blue": (40, 80, 225), "yellow": (240, 220, 40),
    "purple": (150, 45, 190), "orange": (245, 130, 20), "white": (248, 248, 248), "black": (12, 12, 12),
}
Pixels = NDArray[np.float32]


def draw(clip: Clip, frames: Sequence[int] | None = None, window: Field = WHOLE) -> NDArray[np.uint8]:
    """uint8 [N, height, width, 3]: the given frames of a clip (all of them by default), seen through a window."""
    chosen = range(clip.frames) if frames is None else frames
    left, top, right, bottom = window
    out = np.empty((len(chosen), bottom - top, right - left, 3), np.uint8)
    for place, frame in enumerate(chosen):
        picture, share = _paint(clip, frame, window), clip.ghost[frame]
        if share and frame + 1 < clip.frames:
            picture = (1 - share) * picture + share * _paint(clip, frame + 1, window)
        if clip.noise:
            grain = _grain()
            at = clip.noise_seed + frame
            y, x = (7919 * at) % 389 + top, (104729 * (at % 1009)) % 383 + left
            picture = picture + clip.noise * grain[y : y + bottom - top, x : x + right - left]
        out[place] = np.clip(picture + 0.5, 0, 255)
    return out


def _paint(clip: Clip, frame: int, window: Field) -> Pixels:
    """float32 [height, width, 3] without noise."""
    scene = clip.scene(frame)
    shift = 2.0 * frame if scene.background == "drift" else 0.0
    picture = _background(scene, shift, window).copy()
    for thing in clip.visible(frame):
        _stamp(picture, thing, clip.centre(thing, frame), RGB[clip.colour(thing, frame)], window)
    return picture


def _stamp(
    picture: Pixels, thing: Thing, centre: tuple[float, float], colour: tuple[int, int, int], window: Field
) -> None:
    radius = RADIUS[thing.size]
    x, y = centre[0] - window[0], centre[1] - window[1]
    height, width = picture.shape[:2]
    x0, x1 = max(0, floor(x - radius) - 1), min(width, floor(x + radius) + 2)
    y0, y1 = max(0, floor(y - radius) - 1), min(height, floor(y + radius) + 2)
    if x0 >= x1 or y0 >= y1:
        return
    u = ((np.arange(x0, x1, dtype=np.float32) + 0.5 - x) / radius)[None, :]
    v = ((np.arange(y0, y1, dtype=np.float32) + 0.5 - y) / radius)[:, None]
    cover = np.clip(0.5 - inside(thing.shape, u, v) * radius, 0, 1)[..., None]  # one pixel of soft edge
    part = picture[y0:y1, x0:x1]
    part += cover * (np.asarray(colour, np.float32) - part)


def inside(shape: str, u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """About the distance to the shape's edge, negative inside; u right, v down, the shape's box is [-1, 1]^2."""
    far = np.hypot(u, v)
    if shape == "circle":
        return far - 0.95
    if shape == "ring":
        return np.abs(far - 0.72) - 0.24
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.82
    if shape == "diamond":
        return (np.abs(u) + np.abs(v) - 1.0) * 0.71
    if shape == "cross":
        narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return np.maximum(narrow - 0.3, wide - 0.95)
    if shape == "triangle":
        return np.maximum(v - 0.75, (np.abs(u) * 1.75 - v - 0.95) * 0.5)
    if shape == "star":
        angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # from the nearest tip
        tip, notch = 1.0, 0.42
        a = np.array([np.sin(0.0), np.cos(0.0)]) * tip
        b = np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)]) * notch
        normal = np.array([b[1] - a[1], a[0] - b[0]])
        normal = -normal / np.hypot(*normal)
        return (far * np.sin(angle) - a[0]) * normal[0] + (far * np.cos(angle) - a[1]) * normal[1]
    if shape == "heart":
        x, y = np.abs(u) * 1.15, -v * 1.15 + 0.15
        lobes = np.hypot(x - 0.5, y - 0.45) - 0.55
        return np.minimum(lobes, np.maximum(x * 0.72 - (y + 0.98) * 0.69, y - 0.45)) * 0.9
    raise KeyError(shape)


@lru_cache(maxsize=64)
def _still_background(scene: Scene, window: Field) -> Pixels:
    return _background_at(scene, 0.0, window)


def _background(scene: Scene, shift: float, window: Field) -> Pixels:
    return _background_at(scene, shift, window) if scene.background == "drift" else _still_background(scene, window)


def _background_at(scene: Scene, shift: float, window: Field) -> Pixels:
    """float32 [height, width, 3]: greys with a tint, never as strong a colour as a thing's."""
    left, top, right, bottom = window
    rng = np.random.default_rng(scene.seed)
    base = rng.uniform(85, 170) + rng.uniform(-14, 14, 3)
    waves, phases, lean = rng.uniform(0.02, 0.12, (2, 2)), rng.uniform(0, 6.28, 2), rng.uniform(-1, 1, 2)
    x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(shift)
    y = np.arange(top, bottom, dtype=np.float32)[:, None]
    level = np.zeros((bottom - top, right - left), np.float32)
    if scene.background == "gradient":
        level += ((lean[0] * (x - 192) + lean[1] * (y - 192)) * 0.14).astype(np.float32)
    elif scene.background == "stripes":
        level += (14 * np.sin(waves[0, 0] * x + waves[0, 1] * y + phases[0])).astype(np.float32)
    elif scene.background == "drift":
        for (wx, wy), phase in zip(waves, phases):
            level += (9 * np.sin(wx * x + wy * y + phase)).astype(np.float32)
    elif scene.background == "clutter":
        for cx, cy, radius, grey in zip(
            rng.uniform(0, 384, 26), rng.uniform(0, 384, 26), rng.uniform(8, 34, 26), rng.uniform(-30, 30, 26)
        ):
            far = np.hypot(x - np.float32(cx), (y - np.float32(cy)) * np.float32(1.3))
            level += np.float32(grey) * np.clip((np.float32(radius) - far) / 6, 0, 1)
    return (np.asarray(base, np.float32) + level[..., None]).astype(np.float32)


@lru_cache(maxsize=1)
def _grain() -> Pixels:
    """Gaussian noise, one grain for all frames: each shows another part of it."""
    return np.random.default_rng(7).standard_normal((SIDE, SIDE, 3), dtype=np.float32)


SIDE = 800
