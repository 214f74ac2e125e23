"""Stage II in fixed shapes: selections, ties, newlines."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from earlytom import reference
from earlytom.newlines import grid_token_count, insert_grid_newlines
from earlytom.ranking import positions_of, rank
from earlytom.tokens import gather_tokens, select_contextual, select_positions

scores = st.integers(0, 2**31).flatmap(
    lambda seed: st.sampled_from([4, 1000]).map(
        lambda levels: torch.randint(0, levels, (2, 5, 49), generator=torch.Generator().manual_seed(seed)).float()
    )
)


@given(scores)
def test_rank_is_a_stable_descending_sort(score):
    expected = score.sort(dim=-1, descending=True, stable=True).indices
    found = rank(score)
    assert torch.equal(found.gather(-1, expected), torch.arange(49).expand(2, 5, 49))


@given(scores, st.integers(1, 49))
def test_dynamic_frames_keep_the_most_attended_in_position_order(score, keep):
    kept = select_positions(score, torch.ones(2, 5, dtype=torch.bool), keep)
    expected = score.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(-1).values
    assert torch.equal(kept, expected)


@given(scores, st.integers(1, 49))
def test_static_frames_keep_the_best_of_each_window(score, keep):
    kept = select_positions(score, torch.zeros(2, 5, dtype=torch.bool), keep)
    base, longer = divmod(49, keep)
    at = 0
    for j in range(keep):
        size = base + (j < longer)
        assert torch.equal(kept[..., j], at + score[..., at : at + size].argmax(-1))
        at += size
    assert at == 49


def test_each_frame_follows_its_own_mask():
    score = torch.rand(1, 2, 49)
    mixed = select_positions(score, torch.tensor([[True, False]]), 7)
    assert torch.equal(mixed[:, 0], select_positions(score, torch.ones(1, 2, dtype=torch.bool), 7)[:, 0])
    assert torch.equal(mixed[:, 1], select_positions(score, torch.zeros(1, 2, dtype=torch.bool), 7)[:, 1])


def test_scores_that_are_not_numbers_stay_in_bounds():
    kept = select_positions(torch.full((1, 2, 49), torch.nan), torch.tensor([[True, False]]), 7)
    assert kept.shape == (1, 2, 7) and int(kept.max()) < 49 and int(kept.min()) >= 0


def test_positions_of_a_mask_are_its_marks():
    mask = torch.tensor([[False, True, True, False, True], [True, True, False, False, True]])
    assert positions_of(mask, 3).tolist() == [[1, 2, 4], [0, 1, 4]]


@given(st.integers(0, 2**31), st.integers(1, 16), st.booleans())
def test_grid_newlines_are_those_of_the_oracle(seed, keep, shuffled):
    generator = torch.Generator().manual_seed(seed)
    side, frames = 4, 3
    positions = torch.stack([torch.randperm(side * side, generator=generator)[:keep] for _ in range(2 * frames)])
    if not shuffled:
        positions = positions.sort(-1).values
    positions = positions.view(2, frames, keep)
    tokens, newline = torch.randn(2, frames, keep, 5, generator=generator), torch.full((5,), 9.0)
    filled = insert_grid_newlines(tokens, positions, newline, side)
    counts = grid_token_count(positions, side)
    assert filled.shape == (2, frames * (keep + min(side, keep)), 5)
    for v in range(2):
        frame = torch.arange(frames).repeat_interleave(keep)
        expected = reference._grid_order(tokens[v].flatten(0, 1), frame, positions[v].flatten(), newline[None], side)
        assert int(counts[v]) == len(expected)
        assert torch.equal(filled[v, : len(expected)], expected)
        assert (filled[v, len(expected) :] == newline).all()


def test_contextual_selection_is_the_same_for_a_frame_alone():
    features, received = torch.randn(3, 49, 8), torch.rand(3, 49)
    settings = {"dominant": 12, "contextual": 5, "neighbours": 7, "beta": 0.6}
    tokens, positions = select_contextual(features, received, **settings)
    for f in range(3):
        alone, places = select_contextual(features[f : f + 1], received[f : f + 1], **settings)
        torch.testing.assert_close(tokens[f : f + 1], alone)
        assert torch.equal(positions[f : f + 1], places)
    assert torch.equal(tokens[:, :12], gather_tokens(features, positions[:, :12]))
    assert all(len(row.unique()) == 17 for row in positions)
