"""Pixels in, pictures out: a video file to frames, a made-up clip, and a picture of what was kept.

Importing this loads neither a codec nor Pillow nor torch: each is imported when the first file needs it.
"""

from __future__ import annotations

from .clips import synthetic_clip, verification_clips
from .damage import Damage
from .explain import check_picture_path, describe_mix, draw_explanation
from .reader import VideoFrames, read_frames, sample_indices
from .resize import resize_frames

__all__ = [
    "Damage",
    "VideoFrames",
    "check_picture_path",
    "describe_mix",
    "draw_explanation",
    "read_frames",
    "resize_frames",
    "sample_indices",
    "synthetic_clip",
    "verification_clips",
]
