"""The picture of what was kept, and the clip that exports are verified on."""

import numpy as np
import pytest
import torch
from PIL import Image

from earlytom.errors import InputError, VideoError
from earlytom.video.clips import synthetic_clip
from earlytom.video.explain import DYNAMIC, STATIC, describe_mix, draw_explanation


def test_mixes_are_said_in_words():
    assert describe_mix([0, 1.0, 0]) == "1"
    assert describe_mix(torch.tensor([0, 0.6, 0.4])) == "1+2 (.60 .40)"
    assert describe_mix([0.2, 0.2, 0.2, 0, 0.2, 0, 0.1, 0.1]) == "0-2, 4, 6-7"


def test_picture_shows_kept_patches_bright_and_marks_frames(tmp_path):
    frames = np.full((3, 56, 56, 3), 255, np.uint8)
    weights = torch.tensor([[1.0, 0, 0], [0, 0.3, 0.7]])
    positions, dynamic = torch.tensor([[0], [3]]), torch.tensor([True, False])
    path = tmp_path / "out.png"
    draw_explanation(frames, positions, dynamic, weights, grid=2, timestamps=[0, 1, 2], path=path)
    image = np.asarray(Image.open(path).convert("RGB"))
    colours = {tuple(c) for c in image.reshape(-1, 3).tolist()}
    assert {DYNAMIC, STATIC} <= colours
    bright = (image == 255).all(-1).mean()
    draw_explanation(frames, torch.arange(4).expand(2, 4), dynamic, weights, grid=2, path=path)
    everything = np.asarray(Image.open(path).convert("RGB"))
    assert (everything == 255).all(-1).mean() > bright, "more patches kept, more of the picture bright"


def test_what_does_not_belong_together_is_refused(tmp_path):
    frames = np.zeros((3, 56, 56, 3), np.uint8)
    positions, dynamic = torch.tensor([[0], [3]]), torch.tensor([True, False])
    with pytest.raises(InputError, match="3 frames do not go with"):
        draw_explanation(frames, positions, dynamic, torch.eye(4)[:2], grid=2, path=tmp_path / "out.png")
    with pytest.raises(VideoError, match="cannot be written"):
        draw_explanation(frames, positions, dynamic, torch.eye(3)[:2], grid=2, path=tmp_path / "no" / "out.png")


def test_the_synthetic_clip_is_the_same_every_time_and_has_cuts():
    clip = synthetic_clip(20, 56)
    assert clip.shape == (20, 56, 56, 3) and clip.dtype == np.uint8
    assert (clip == synthetic_clip(20, 56)).all() and (clip != synthetic_clip(20, 56, seed=1)).any()
    change = np.abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3))
    assert set(np.argsort(change)[-2:]) == {8, 17}, "the largest changes are the cuts"
