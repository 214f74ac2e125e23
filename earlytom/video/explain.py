"""A picture of what was kept: source frames, patches, dynamic and static marks, and what each frame left stands for."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, VideoError
from ..files import replacing
from .resize import import_pillow

if TYPE_CHECKING:
    from torch import Tensor

CELL = 196  # pixels of a frame in the picture
LINE, FONT = 19, 15  # of text
GAP = 8
DYNAMIC, STATIC, GONE = (46, 160, 67), (56, 109, 221), (120, 120, 120)


def describe_mix(row: Sequence[float] | Tensor, *, least: float = 0.005) -> str:
    """One row of the composite weights in words: "12" for a frame of its own, "12+13 (.6 .4)", "3-7, 9" for many."""
    parts = [(frame, float(weight)) for frame, weight in enumerate(row) if abs(float(weight)) >= least]
    frames = [frame for frame, _ in parts]
    if len(parts) == 1:
        return str(frames[0])
    if len(parts) <= 3:
        shown = " ".join(f"{weight:.2f}".replace("0.", ".") for _, weight in parts)
        return f"{'+'.join(map(str, frames))} ({shown})"
    runs: list[list[int]] = []
    for frame in frames:
        if runs and frame == runs[-1][-1] + 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def check_picture_path(path: str | Path) -> Path:
    """The path of a picture, found to be writable, so that a wrong one is refused before any work; nothing is left.

    Raises VideoError: no .png, a directory or a device, a directory that is missing or not writable, a name too long.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            kind = "a directory" if file.is_dir() else "no regular file"
            raise VideoError(f"the picture {file} cannot be written: this is {kind}; the name of a file is needed")
        if file.suffix.lower() != ".png":
            raise VideoError(f"the picture {file} cannot be written: a name that ends in .png is needed")
        if not file.parent.is_dir():
            raise VideoError(f"the picture {file} cannot be written: there is no directory {file.parent}")
        probe = file.with_name(f".{secrets.token_hex(4)}.tmp")
        probe.touch()
        probe.unlink()
        with suppress(FileNotFoundError):
            file.open("r+b").close()  # a name too long, or a file that may not be written
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise _unwritable(file, error) from None
    return file


def draw_explanation(
    frames: NDArray[np.uint8],
    positions: Tensor,
    dynamic: Tensor,
    weights: Tensor,
    *,
    grid: int,
    timestamps: Sequence[float] | None = None,
    path: str | Path,
) -> None:
    """Write a PNG with every source frame in order, whole or not at all.

    frames uint8 [T, H, W, 3]; positions [B, n] on the pooled grid x grid, padded with negative ones where frames keep
    unequal numbers of patches; dynamic [B]; weights [B, T]: of one video. Kept patches are bright, the others dark; a
    green border marks a dynamic frame, a blue one a static frame, and the line under it says which source frames it
    stands for. Frames that were merged away are pale. Raises InputError when the shapes do not belong together,
    VideoError when the file cannot be written.
    """
    file = check_picture_path(path)
    pil = import_pillow()
    total, left = len(frames), len(weights)
    if weights.shape[1] != total or len(positions) != left or len(dynamic) != left:
        raise InputError(
            f"{total} frames do not go with weights {list(weights.shape)}, positions {list(positions.shape)} and "
            f"dynamic {list(dynamic.shape)}"
        )
    kept = [[p for p in row if p >= 0] for row in positions.tolist()]
    # A frame left is drawn at the source frame that weighs most in it; no source frame is in two rows.
    shown_at = {int(row.abs().argmax()): b for b, row in enumerate(weights)}
    owner = {t: b for b, row in enumerate(weights) for t in row.nonzero().flatten().tolist()}
    columns = math.ceil(math.sqrt(total * 1.6))
    rows = math.ceil(total / columns)
    high = CELL + 2 * LINE + GAP
    sheet = pil.Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * high + GAP + 2 * LINE), "white")
    draw = pil.ImageDraw.Draw(sheet)
    draw.font = pil.ImageFont.load_default(FONT)
    draw.text((GAP, GAP // 2), _headline(total, kept, grid), fill="black")
    for t in range(total):
        x, y = GAP + t % columns * (CELL + GAP), GAP + 2 * LINE + t // columns * high
        picture = pil.Image.fromarray(frames[t]).resize((CELL, CELL))
        slot = shown_at.get(t)
        stamp = f"{t}" if timestamps is None else f"{t}  {timestamps[t]:.1f} s"
        if slot is None:
            picture = pil.Image.blend(picture, pil.Image.new("RGB", picture.size, "white"), 0.6)
            note = f"in #{owner[t]}" if t in owner else "dropped"
            border = GONE
        else:
            picture = _darken(picture, kept[slot], grid)
            note = f"#{slot} = {describe_mix(weights[slot])}"
            border = DYNAMIC if bool(dynamic[slot]) else STATIC
        sheet.paste(picture, (x, y))
        draw.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=border, width=3)
        draw.text((x, y + CELL + 2), stamp, fill="black")
        draw.text((x, y + CELL + 2 + LINE), note[: CELL // 7], fill=border)
    _save(sheet, file)


def _headline(total: int, kept: list[list[int]], grid: int) -> str:
    counts = sorted({len(row) for row in kept})
    share = sum(map(len, kept)) / (total * grid * grid)
    return (
        f"{total} frames -> {len(kept)}, {' or '.join(map(str, counts))} of {grid * grid} patches each: {share:.1%} of "
        "the tokens   green: dynamic   blue: static   pale: merged into another frame, or dropped"
    )


def _darken(picture: Any, kept: list[int], grid: int) -> Any:
    """`picture` with the patches that are not kept at a third of their light."""
    pil = import_pillow()
    mask = np.full(grid * grid, 85, np.uint8)
    mask[kept] = 255
    light = pil.Image.fromarray(mask.reshape(grid, grid)).resize(picture.size, pil.Image.Resampling.NEAREST)
    return pil.ImageChops.multiply(picture, pil.Image.merge("RGB", (light, light, light)))


def _save(sheet: Any, file: Path) -> None:
    try:
        with replacing(file) as temporary:
            sheet.save(temporary, format="PNG")
    except OSError as error:
        raise _unwritable(file, error) from None


def _unwritable(file: Path, error: Exception) -> VideoError:
    return VideoError(f"the picture {file} cannot be written: {getattr(error, 'strerror', None) or error}")
