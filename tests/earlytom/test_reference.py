"""The oracle against the released code's own answers."""

import pytest
import torch

from earlytom import reference
from earlytom.clustering import dpc_knn, merge_clusters
from earlytom.errors import ConfigError, InputError
from tests.cases import cases, small_clip, small_vision, spans

TOLERANCE = 1e-5


@pytest.mark.parametrize("case", cases("merge"), ids=str)
def test_merge_frames_gives_the_released_answers(case):
    merged, received, segments = reference.merge_frames(case["hidden"], case["received"], **case.meta)
    assert segments == spans(case["segments"])
    torch.testing.assert_close(merged, case["merged"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(received, case["merged_received"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", cases("select"), ids=str)
def test_select_tokens_gives_the_released_answers(case):
    tokens, frame, position = reference.select_tokens(
        case["feat"], case["received"], spans(case["segments"]), **case.meta
    )
    torch.testing.assert_close(tokens, case["tokens"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(case["feat"][frame, position], case["tokens"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", cases("cluster"), ids=str)
def test_clustering_gives_the_released_answers(case):
    meta = case.meta
    centres = dpc_knn(case["feat"], clusters=meta["clusters"], neighbours=meta["neighbours"])
    assert torch.equal(centres, case["centres"])
    tokens = merge_clusters(case["feat"], centres, beta=meta["beta"], blend=meta["blend"])
    torch.testing.assert_close(tokens, case["tokens"], atol=TOLERANCE, rtol=0)


def test_clustering_treats_each_member_of_a_batch_alone():
    features = torch.randn(3, 40, 6)
    together = dpc_knn(features, clusters=9, neighbours=5)
    alone = torch.cat([dpc_knn(x[None], clusters=9, neighbours=5) for x in features])
    assert torch.equal(together, alone)


def test_ties_between_equal_tokens_go_to_the_lower_index():
    features = torch.zeros(1, 6, 3)
    assert dpc_knn(features, clusters=2, neighbours=3).tolist() == [[0, 1]]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_contextual_tokens_work_for_any_number_of_frames(batch):
    """Quirk 6: the released code crashes here for a batch of up to two."""
    features, received = torch.randn(batch, 49, 8), torch.rand(batch, 49)
    tokens, frame, position = reference.select_tokens(
        features, received, [(f, f) for f in range(batch)], retain_ratio=0.4, contextual=0.3
    )
    budget, dominant = 20, 14  # ceil(49 * 0.4), round(20 * 0.7)
    assert tokens.shape == (batch * budget, 8)
    for f in range(batch):
        kept = position[frame == f]
        best = received[f].argsort(descending=True)[:dominant].sort().values
        assert torch.equal(kept[:dominant], best)
        assert torch.equal(tokens[frame == f][:dominant], features[f, best])
        assert len(kept.unique()) == budget


def test_grid_newlines_close_every_row_that_kept_a_patch_static_frames_too():
    vision = small_vision(newline="grid")
    clip = small_clip(12)[0]
    settings = {"tau": 0.2, "max_window": 6, "ema": 0.9, "merge_layers": [0, 2]}
    tokens = reference.encode_video(vision, clip, retain_ratio=0.3, **settings)
    newline = (tokens == vision.image_newline).all(-1)
    assert newline[-1] and not newline[0]
    assert not (newline[1:] & newline[:-1]).any()  # a row without a patch has no newline
    vision.newline = "no_token"
    bare = reference.encode_video(vision, clip, retain_ratio=0.3, **settings)
    assert torch.equal(tokens[~newline], bare)


def test_bad_input_is_refused_in_a_sentence():
    hidden, received = torch.randn(4, 9, 8), torch.rand(4, 9)
    with pytest.raises(InputError, match=r"received \[4, 8\]"):
        reference.merge_frames(hidden, received[:, :8], tau=0.5, max_window=6, ema=0.9)
    with pytest.raises(ConfigError, match="retain_ratio is 0"):
        reference.select_tokens(hidden, received, [(0, 3)], retain_ratio=0)
    settings = {"retain_ratio": 0.3, "tau": 0.5, "max_window": 6, "ema": 0.9}
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        reference.encode_video(small_vision(), small_clip(4)[0], merge_layers=[40], **settings)
    with pytest.raises(InputError, match="uint8"):
        reference.encode_video(small_vision(), small_clip(4)[0].float(), merge_layers=[1], **settings)
    with pytest.raises(ConfigError, match=r"clusters is 41, it must lie in 1\.\.40"):
        dpc_knn(torch.randn(1, 40, 6), clusters=41, neighbours=5)
