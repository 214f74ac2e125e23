"""The picture of what was kept, and the clip that exports are verified on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from earlytom.errors import InputError, VideoError
from earlytom.tower import StaticTower
from earlytom.video import read_frames
from earlytom.video.clips import synthetic_clip, verification_clips
from earlytom.video.explain import DYNAMIC, GAP, LINE, STATIC, check_picture_path, describe_mix, draw_explanation
from tests.cases import small_clip, small_config, small_vision


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


def test_negative_positions_are_padding(tmp_path):
    """A static frame of one patch beside a dynamic one of two: padded, it is drawn like itself alone."""
    frames, weights = np.full((2, 56, 56, 3), 255, np.uint8), torch.eye(2)
    dynamic = torch.tensor([True, False])
    draw_explanation(frames, torch.tensor([[0, 3], [1, -1]]), dynamic, weights, grid=2, path=tmp_path / "padded.png")
    draw_explanation(frames, torch.tensor([[0, 3], [1, 1]]), dynamic, weights, grid=2, path=tmp_path / "plain.png")
    padded, plain = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("padded", "plain"))
    top = GAP + 2 * LINE
    assert (padded[top:] == plain[top:]).all(), "all but the headline, which counts the patches"
    assert (padded[:top] != plain[:top]).any()


def test_a_frame_merged_away_is_pale_and_keeps_its_colours(tmp_path):
    frames = np.full((2, 56, 56, 3), (200, 0, 100), np.uint8)
    kept = torch.arange(4)[None]
    draw_explanation(frames, kept, torch.tensor([True]), torch.tensor([[0.6, 0.4]]), grid=2, path=tmp_path / "out.png")
    colours = {tuple(c) for c in np.asarray(Image.open(tmp_path / "out.png")).reshape(-1, 3).tolist()}
    assert {(200, 0, 100), (233, 153, 193)} <= colours


def test_what_does_not_belong_together_is_refused(tmp_path):
    frames = np.zeros((3, 56, 56, 3), np.uint8)
    positions, dynamic = torch.tensor([[0], [3]]), torch.tensor([True, False])
    with pytest.raises(InputError, match="3 frames do not go with"):
        draw_explanation(frames, positions, dynamic, torch.eye(4)[:2], grid=2, path=tmp_path / "out.png")
    with pytest.raises(VideoError, match="cannot be written"):
        draw_explanation(frames, positions, dynamic, torch.eye(3)[:2], grid=2, path=tmp_path / "no" / "out.png")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no/kept.png", "there is no directory"),
        ("folder", "this is a directory"),
        ("folder.png", "this is a directory"),
        ("file.png/kept.png", "there is no directory|[Nn]ot a directory"),
        ("kept.jpg", r"ends in \.png"),
        ("kept", r"ends in \.png"),
        ("x" * 300 + ".png", "too long"),
        ("a\0b.png", "null"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VideoError, match=f"cannot be written: .*({reason})") as caught:
        check_picture_path(tmp_path / name)
    assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_that_takes_no_files_is_refused(tmp_path, monkeypatch):
    """As for a user without permission; root, who runs some tests, may write everywhere."""
    monkeypatch.setattr(Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(VideoError, match="cannot be written: Permission denied"):
        check_picture_path(tmp_path / "kept.png")
    with pytest.raises(VideoError, match="this is no regular file"):
        check_picture_path("/dev/null")


def test_a_path_that_can_be_written_is_left_as_it_is(tmp_path):
    assert check_picture_path(str(tmp_path / "kept.PNG")) == tmp_path / "kept.PNG"
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.png").write_bytes(b"old")
    check_picture_path(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def disk_full(self, path, format):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "old.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", disk_full)
    frames, kept = np.zeros((2, 56, 56, 3), np.uint8), torch.tensor([[0], [3]])
    with pytest.raises(VideoError, match=r"old\.png cannot be written: No space left"):
        draw_explanation(frames, kept, kept[:, 0] > 0, torch.eye(2), grid=2, path=tmp_path / "old.png")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("old.png", b"old")]


def test_copies_of_one_frame_pass_the_tower_and_are_drawn(tmp_path):
    """An image as a video: every frame the same, all similarities 1 to rounding, and none divides by their spread."""
    vision, config = small_vision(), small_config()
    Image.fromarray(small_clip(1)[0, 0].numpy()).save(tmp_path / "image.png")
    video = read_frames(tmp_path / "image.png", frames=config.frames, size=84)
    assert video.repeated == config.frames - 1
    tower = StaticTower(vision, config)
    trace, outputs = (call(torch.from_numpy(video.frames)[None]) for call in (tower.trace, tower))
    for stage in trace.stages:
        assert (stage.similarity - 1).abs().max() <= 2e-6, "a float32 dot product over its norms"
        assert (stage.hidden - stage.hidden[:, :1]).abs().max() <= 1e-5, "a mean of copies is the copy"
    assert all(output.isfinite().all() for output in outputs)
    assert torch.allclose(outputs.weights.sum(-1), torch.ones(1, config.frame_budgets[-1]), atol=1e-6)
    path = tmp_path / "kept.png"
    draw_explanation(
        video.frames, outputs.positions[0], outputs.dynamic[0], outputs.weights[0], grid=tower.shapes.pooled_grid,
        timestamps=video.timestamps.tolist(), path=path,
    )
    assert Image.open(path).size[0] > 1000


def test_the_synthetic_clip_is_the_same_every_time_and_has_cuts():
    clip = synthetic_clip(20, 56)
    assert clip.shape == (20, 56, 56, 3) and clip.dtype == np.uint8
    assert (clip == synthetic_clip(20, 56)).all() and (clip != synthetic_clip(20, 56, seed=1)).any()
    change = np.abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3))
    assert set(np.argsort(change)[-2:]) == {8, 17}, "the largest changes are the cuts"


def test_clips_to_verify_on_are_the_video_or_differ(tmp_path):
    Image.fromarray(small_clip(1)[0, 0].numpy()).save(tmp_path / "image.png")
    told: list[str] = []
    clips = verification_clips(tmp_path / "image.png", frames=3, size=28, batch=2, tell=told.append)
    assert clips.shape == (2, 3, 28, 28, 3) and (clips == clips[0, 0]).all()
    assert len(told) == 1 and "2 are repeats" in told[0]
    made = verification_clips(None, frames=3, size=28, batch=2)
    assert made.shape == clips.shape and (made[0] == synthetic_clip(3, 28)).all() and (made[0] != made[1]).any()
