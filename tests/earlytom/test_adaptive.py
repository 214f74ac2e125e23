"""The adaptive tower against the oracle and the released code's own answers, whatever the counts."""

import pytest
import torch

from earlytom import load, reference
from earlytom.adaptive import AdaptiveTower
from earlytom.config import EarlyTomConfig
from earlytom.errors import ConfigError, InputError
from earlytom.newlines import grid_token_count
from earlytom.parity.oracle import oracle_trace
from earlytom.tower import split_videos
from earlytom.video.explain import draw_explanation
from earlytom.vision.geometry import pooled_grid
from tests.cases import TINY, cases, small_clip, small_config, small_vision

E2E = cases("e2e/e2e")


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, parts=("vision",)).vision


@pytest.mark.parametrize("case", E2E[:3], ids=str)  # 3 and 4 have the visual tokens of 0 and 1
def test_golden_tokens_come_out_whatever_the_counts(case, tiny, e2e_frames):
    meta = case.meta
    config = EarlyTomConfig(
        retain=meta["retain_ratio"], merge_layers=tuple(meta["merge_layers"]), tau=meta["tau"],
        max_window=meta["max_window"], ema=meta["ema"],
    )
    outputs = AdaptiveTower(tiny, config).encode(torch.from_numpy(e2e_frames.copy()))
    torch.testing.assert_close(outputs.tokens, case["visual"], atol=1e-4, rtol=0)
    ends = {frame for segment in meta["segments"] for frame in segment}
    assert outputs.dynamic.tolist() == [frame in ends for frame in range(meta["stages"][-1][1])]


@pytest.mark.parametrize("newline", ["one_token", "grid", "no_token"])
@pytest.mark.parametrize("changes", [{}, {"contextual": 0.2}, {"retain": 0.9}, {"merge_layers": (0, 2)}], ids=str)
def test_the_oracle_is_met_in_every_output(newline, changes):
    """Other clips, newlines and settings than the golden ones, with frames that keep different numbers of patches."""
    vision = small_vision(newline=newline)
    for frames in (1, 2, 12, 31):
        config = small_config(newline=newline, frame_budgets=None, **changes)
        clip = small_clip(frames, seed=frames)[0]
        outputs, oracle = AdaptiveTower(vision, config).encode(clip), oracle_trace(vision, clip, config)
        assert [row[row >= 0].tolist() for row in outputs.positions] == [kept.tolist() for kept in oracle.positions]
        assert torch.equal(outputs.dynamic, oracle.dynamic)
        torch.testing.assert_close(outputs.weights, oracle.weights, atol=1e-5, rtol=0)
        sequence = torch.cat(oracle.tokens)
        if newline == "one_token":
            sequence = torch.cat([sequence, vision.image_newline[None]])
        elif newline == "grid":
            frame = torch.repeat_interleave(torch.tensor([len(kept) for kept in oracle.positions]))
            positions = torch.cat(oracle.positions)
            sequence = reference._grid_order(sequence, frame, positions, vision.image_newline[None], 3)
            assert int(grid_token_count(outputs.positions[None], 3)) == len(sequence)
        torch.testing.assert_close(outputs.tokens, sequence, atol=1e-4, rtol=0)


def test_pixels_and_a_leading_dimension_give_the_same():
    vision, config, clip = small_vision(newline="grid"), small_config(newline="grid"), small_clip(12)[0]
    tower = AdaptiveTower(vision, config)
    expected = tower.encode(clip)
    pixels = tower.encode_pixels(((clip / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
    grid = pooled_grid(vision.geometry.grid, config.pooling)
    (video,) = split_videos(tower(clip[None]), config, grid)  # as a pipeline has it
    for one, other, leading in zip(expected, pixels, video):
        torch.testing.assert_close(one, other)
        assert torch.equal(one, leading)


@pytest.mark.parametrize("contextual", [0.0, 0.3])
def test_half_precision_runs(contextual):
    tower = AdaptiveTower(small_vision().to(torch.bfloat16), small_config(contextual=contextual))
    outputs = tower.encode(small_clip(12)[0])
    assert outputs.tokens.dtype == torch.bfloat16 and outputs.tokens.isfinite().all()
    assert outputs.weights.dtype == torch.float32


def test_without_merge_layers_nothing_is_pruned():
    vision, clip = small_vision(newline="grid"), small_clip(4)[0]
    config = small_config(newline="grid", merge_layers=(), retain=1, frame_budgets=())
    outputs = AdaptiveTower(vision, config).encode(clip)
    torch.testing.assert_close(outputs.tokens, vision.encode_all(clip))
    assert outputs.positions.shape == (4, 9) and outputs.dynamic.all() and torch.equal(outputs.weights, torch.eye(4))


def test_what_frames_with_unequal_counts_kept_can_be_drawn(tmp_path):
    clip = small_clip(12)[0]
    outputs = AdaptiveTower(small_vision(), small_config(tau=-1.0)).encode(clip)
    assert (outputs.positions == -1).any(), "a static frame with a patch less"
    draw_explanation(clip.numpy(), *outputs[1:], grid=3, path=tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 0


def test_bad_input_is_refused_in_a_sentence():
    tower = AdaptiveTower(small_vision(), small_config())
    clip = small_clip(4)
    wrong = {tower: [clip[0]], tower.encode: [clip, clip[0].float(), clip[0, :0]], tower.encode_pixels: [clip[0]]}
    for call, arguments in wrong.items():
        for argument in arguments:
            with pytest.raises(InputError, match="the tower takes"):
                call(argument)
    with pytest.raises(ConfigError, match="merge layer 40 does not exist"):
        AdaptiveTower(small_vision(), small_config(merge_layers=(0, 1, 40)))
    with pytest.raises(ConfigError, match="trained with one_token"):
        AdaptiveTower(small_vision(), small_config(newline="grid"))
