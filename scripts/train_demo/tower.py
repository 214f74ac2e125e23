"""Stage 1: the tower learns to see, one frame at a time, through windows of 14 x 14 patches, then whole frames.

What it is asked at each patch of its last layer, through linear heads that are thrown away: the shape, colour and size
of what is there and how far its centre is (so that the patch describes its thing), where the patch itself is, and, from
everywhere in the frame, how many things there are and how far the nearest is (so that patches look at things).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from earlytom.demo.draw import draw, inside
from earlytom.demo.world import (
    BACKGROUNDS,
    COLOURS,
    RADIUS,
    SHAPES,
    SIZE,
    Clip,
    Field,
    Scene,
    Thing,
    is_held_out,
    make_clip,
)
from earlytom.vision.siglip import Vision, normalised

PATCH, GRID, WINDOW = 14, 27, 14  # pixels of a patch; patches of a frame and of a window, per side
FRAMES = 8  # of the clips that frames are taken from
HALVES = (slice(0, 4), slice(3, 7))
COUNTS = 5  # none to four or more things of a size


@dataclass(frozen=True)
class Batch:
    """frames uint8 [N, H, W, 3]; corner int64 [N, 2]: the window's first row and column of patches; the rest are labels
    of each of its patches: thing [N, S, 3] (shape, colour, size; 0 is none), offset [N, S, 2] to its centre, counts
    [N, 2] of small and large things, near [N, S, 2]: offset to the nearest centre. Offsets in patches. mask [N, S, 49]:
    whether things cover each of 7 x 7 points of a patch; around [N, S, 100]: how much of each half patch they cover, in
    the 5 x 5 patches around it."""

    frames: Tensor
    corner: Tensor
    thing: Tensor
    offset: Tensor
    counts: Tensor
    near: Tensor
    mask: Tensor
    around: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Heads(nn.Module):
    """What is read off a patch of the last layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(SHAPES) + 1, len(COLOURS) + 1, len(RADIUS) + 1, 2, COUNTS, COUNTS, 2, 2)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(self.sizes))
        # What earlier layers are asked for: they have to find it before anything can be named.
        self.outline = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 49))
        self.around = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 100))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.norm(features)).split(self.sizes, dim=-1)


OUTLINE, AROUND = 1, 3  # the layers at which outlines are asked for, of a patch and around it


def see(vision: Vision, frames: Tensor, corner: Tensor) -> list[Tensor]:
    """Windows uint8 [N, H, W, 3] whose first patch lies at corner [N, 2] of the frame -> all layers' [N, S, D]."""
    x = vision.patch_embedding(normalised(frames))
    n, _, rows, columns = x.shape
    x = x.flatten(2).transpose(1, 2) + vision.position_embedding[places(corner, rows, columns)]
    seen = []
    for layer in vision.layers:
        x, _ = layer(x)
        seen.append(x)
    return seen


def places(corner: Tensor, rows: int, columns: int) -> Tensor:
    """corner [N, 2] -> index into the frame's patches of each patch of the window [N, S]."""
    row = corner[:, 0, None, None] + torch.arange(rows, device=corner.device)[:, None]
    column = corner[:, 1, None, None] + torch.arange(columns, device=corner.device)
    return (row * GRID + column).flatten(1)


def window_of(rng: Random, side: int) -> tuple[tuple[int, int], Field]:
    """A window of side x side patches: its corner in patches, and in pixels."""
    row, column = rng.randint(0, GRID - side), rng.randint(0, GRID - side)
    return (row, column), (column * PATCH, row * PATCH, (column + side) * PATCH, (row + side) * PATCH)


def make_batch(seed: int, step: int, size: int, side: int = WINDOW) -> Batch:
    """Batch `step` of the training: `size` windows, each of its own clip."""
    rng = Random(f"tower {seed} {step}")
    frames, corners, labels = [], [], []
    for i in range(size):
        corner, window = window_of(rng, side)
        field = window if side < GRID else (0, 0, SIZE, SIZE)
        if i % 2:
            clip, frame = crowd(rng, field), 0
        else:
            clip, frame = make_clip("train", seed, step * 1000 + i, frames=FRAMES, field=field), rng.randrange(FRAMES)
        frames.append(draw(clip, [frame], window)[0])
        corners.append(corner)
        labels.append(label(clip, frame, corner, side))
    stacked = (torch.from_numpy(np.stack(x)) for x in zip(*labels))
    return Batch(torch.from_numpy(np.stack(frames)), torch.tensor(corners), *stacked)


def crowd(rng: Random, field: Field) -> Clip:
    """A still of up to seven things, many times what a clip shows: more to learn from a frame."""
    things: list[Thing] = []
    for _ in range(rng.randint(3, 24)):
        size, shape, colour = rng.choice(["small", "small", "large"]), rng.choice(SHAPES), rng.choice(COLOURS)
        radius = RADIUS[size] + 2
        x, y = rng.uniform(field[0] + radius, field[2] - radius), rng.uniform(field[1] + radius, field[3] - radius)
        apart = all(max(abs(x - t.x), abs(y - t.y)) > radius + RADIUS[t.size] + 2 for t in things)
        if apart and len(things) < 7 and not is_held_out(colour, shape, "still"):
            things.append(Thing(shape, colour, size, x, y, "still", 0, 0, 1))
    scene = Scene(0, rng.choice(BACKGROUNDS), rng.randrange(2**31))
    return Clip(1, tuple(things), (scene,), (0.0,), (0.0,), rng.choice([0.0, 3.0, 6.0, 10.0]), rng.randrange(2**31))


def label(clip: Clip, frame: int, corner: tuple[int, int], side: int, patch: int = PATCH) -> tuple[NDArray, ...]:
    """The labels of Batch for one window of side x side patches of `patch` pixels; offsets in units of PATCH.

    A ghosted frame counts as the one that shows more.
    """
    if clip.ghost[frame] > 0.5 and frame + 1 < clip.frames:
        frame += 1
    s = side * side
    best = np.full(s, 0.12 * PATCH / patch, np.float32)  # less of a coarse patch: a small thing at its corner counts
    thing, offset = np.zeros((s, 3), np.int64), np.zeros((s, 2), np.float32)
    near, nearest = np.zeros((s, 2), np.float32), np.full(s, np.inf, np.float32)
    counts, mask = np.zeros(2, np.int64), np.zeros((s, 49), np.float32)
    sizes = tuple(RADIUS)
    at = (np.arange(side * 7, dtype=np.float32) + 0.5) * patch / 7  # every second pixel of a patch of 14
    middle = (np.arange(side, dtype=np.float32) + 0.5) * patch
    for seen in clip.visible(frame):
        x, y = clip.centre(seen, frame)
        x, y, radius = x - corner[1] * patch, y - corner[0] * patch, RADIUS[seen.size]
        covered = inside(seen.shape, ((at - x) / radius)[None, :], ((at - y) / radius)[:, None]) < 0
        points = covered.reshape(side, 7, side, 7).transpose(0, 2, 1, 3).reshape(s, 49)
        mask += points
        share = points.mean(1)
        far = np.stack(np.broadcast_arrays((x - middle)[None, :], (y - middle)[:, None]), -1).reshape(s, 2) / PATCH
        mine = share > best
        best[mine] = share[mine]
        colour = COLOURS.index(clip.colour(seen, frame))
        thing[mine] = (SHAPES.index(seen.shape) + 1, colour + 1, sizes.index(seen.size) + 1)
        offset[mine] = far[mine]
        closer = np.hypot(*far.T) < nearest
        nearest[closer], near[closer] = np.hypot(*far.T)[closer], far[closer]
        counts[sizes.index(seen.size)] += 1
    mask = mask.clip(max=1)
    return thing, offset, counts.clip(max=COUNTS - 1), near, mask, _around(mask, side)


def _around(mask: NDArray, side: int) -> NDArray:
    """Points [S, 49] -> the cover of half patches in the 5 x 5 patches around each [S, 100]."""
    points = mask.reshape(side, side, 7, 7)
    halves = np.stack([[points[:, :, a, b].mean((2, 3)) for b in HALVES] for a in HALVES])  # [2, 2, side, side]
    field = np.pad(halves.transpose(2, 0, 3, 1).reshape(2 * side, 2 * side), 4)
    return np.lib.stride_tricks.sliding_window_view(field, (10, 10))[::2, ::2].reshape(side * side, 100).copy()


def loss_of(seen: list[Tensor], heads: Heads, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """seen: of each layer (see) -> the sum of all losses, and what to log: each of them, and the share of patches of
    things that are named right."""
    features = seen[-1]
    n, s, _ = features.shape
    shape, colour, size, offset, small, large, near, own = heads(features)
    there = batch.thing[..., 0] > 0
    weight = torch.where(there, 1.0, 0.1)
    weight = weight / weight.sum()
    losses = {
        name: (F.cross_entropy(logits.transpose(1, 2), batch.thing[..., i], reduction="none") * weight).sum()
        for i, (name, logits) in enumerate([("shape", shape), ("colour", colour), ("size", size)])
    }
    losses["offset"] = F.smooth_l1_loss(offset[there], batch.offset[there]) if there.any() else features.sum() * 0
    for i, (name, logits) in enumerate([("small", small), ("large", large)]):
        losses[name] = F.cross_entropy(logits.flatten(0, 1), batch.counts[:, i].repeat_interleave(s)) * 0.5
    for name, said, target in (("outline", heads.outline(seen[OUTLINE]), batch.mask),
                               ("around", heads.around(seen[AROUND]), batch.around)):
        wrong = F.binary_cross_entropy_with_logits(said, target, reduction="none").mean(-1)
        losses[name] = 2 * (wrong * weight).sum()
    some = batch.counts.sum(1) > 0
    losses["near"] = F.smooth_l1_loss(near[some], batch.near[some]) * 0.5
    at = places(batch.corner, int(s**0.5), int(s**0.5))
    where = (torch.stack([at % GRID, at // GRID], -1) + 0.5) * (PATCH * 2 / SIZE) - 1
    losses["own"] = F.mse_loss(own, where)
    total = torch.stack(list(losses.values())).sum()
    right = (shape.argmax(-1) == batch.thing[..., 0]) & (colour.argmax(-1) == batch.thing[..., 1])
    log = {name: value.item() for name, value in losses.items()}
    counted = (small.argmax(-1) == batch.counts[:, :1]) & (large.argmax(-1) == batch.counts[:, 1:])
    return total, log | {"named": right[there].float().mean().item(), "counted": counted.float().mean().item()}
