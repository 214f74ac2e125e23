"""Several forms of merging on one clip: each gives what its tower gives alone, and what they share is computed once."""

from __future__ import annotations

import pytest
import torch

from earlytom import AdaptiveTower, StaticTower, reference
from earlytom.calibration.agreement import difference
from earlytom.calibration.merging import merge_clip, mix_of
from earlytom.errors import ConfigError, InputError
from tests.cases import small_clip, small_config, small_vision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(3))
def test_each_form_is_its_tower(seed):
    vision, config, clip = small_vision(seed=seed), small_config(), small_clip(12, seed=seed)[0]
    counts = tuple(reference.frame_counts(vision, clip, **config.segmenting, merge_layers=config.merge_layers))
    forms = [None, (10, 8, 6), (10, 8, 4), counts, (12, 12, 12)]
    found = merge_clip(vision, config, clip, forms)
    assert [merged.counts for merged in found] == [counts, *forms[1:]]
    assert found[3] == found[0] and difference(found[3], found[0]).equal

    def dense(mix):
        weights = torch.zeros(len(mix), 12)
        for i, row in enumerate(mix):
            for frame, weight in row:
                weights[i, frame] = weight
        return weights

    expected = [AdaptiveTower(vision, config).encode(clip).weights]
    expected += [StaticTower(vision, config.replace(frame_budgets=form))(clip[None]).weights[0] for form in forms[1:]
                 if form is not counts]
    for merged, weights in zip([found[0], found[1], found[2], found[4]], expected):
        torch.testing.assert_close(dense(merged.mix), weights, atol=1e-5, rtol=0)
    assert found[4].mix == tuple(((frame, 1.0),) for frame in range(12))


def test_layers_run_once_for_forms_that_left_the_same():
    vision, config, clip = small_vision(), small_config(), small_clip(12)[0]  # merging after layers 0, 1 and 3
    frames = [0] * len(vision.layers)
    for index, layer in enumerate(vision.layers):
        layer.register_forward_hook(lambda _, given, __, i=index: frames.__setitem__(i, frames[i] + len(given[0])))
    merge_clip(vision, config, clip, [(10, 8, 6), (10, 7, 6), (9, 7, 6)])
    assert frames == [12, 10 + 9, 8 + 7 + 7, 8 + 7 + 7]


def test_a_mix_is_what_a_row_holds():
    assert mix_of(torch.tensor([[1.0, 0, 0], [0, 0.25, 0.75]])) == (((0, 1.0),), ((1, 0.25), (2, 0.75)))


def test_refusals():
    vision, config, clip = small_vision(), small_config(), small_clip(12)[0]
    for wrong in (clip.float(), clip[None], clip[:0]):
        with pytest.raises(InputError, match="must be uint8"):
            merge_clip(vision, config, wrong, [None])
    with pytest.raises(ConfigError, match="do not fit 3 merge layers"):
        merge_clip(vision, config, clip, [None, (10, 8)])
    with pytest.raises(ConfigError, match="nothing is merged"):
        merge_clip(vision, small_config(merge_layers=(), frame_budgets=(), retain=1), clip, [None])
