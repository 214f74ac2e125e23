"""Bytes and parts of an answer by hand, and how they grow; the paper's formula, and what is published of it."""

from __future__ import annotations

import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from earlytom.config import EarlyTomConfig, InnerMerging
from earlytom.errors import ConfigError
from earlytom.flops import (
    Prompt,
    language_decode,
    language_prefill,
    language_weight_count,
    model_work,
    prefill_flops,
    tower_cost,
    tower_flops,
    unpruned_config,
    weight_count,
)
from earlytom.language.geometry import PUBLISHED, LanguageGeometry
from earlytom.presets import preset
from earlytom.shapes import derive_shapes
from earlytom.vision.geometry import VisionGeometry
from tests.cases import SMALL, small_config

LLM = LanguageGeometry(4, 24, 4, 2, 6, 40, 19)
INNER = InnerMerging(3, 0.5)


def test_the_parts_are_the_counts():
    config = small_config(inner=INNER)
    work = model_work(config, SMALL, LLM, text_tokens=5, batch=2, dtype="fp16")
    for call, each in ((work.before, unpruned_config(config)), (work.after, config)):
        tower, prompt = tower_flops(each, SMALL, 2), Prompt(5, derive_shapes(each, SMALL).tokens, each.inner)
        assert (call.vision.flops, call.projector.flops) == (tower.vision, tower.projector)
        assert call.prefill.flops == language_prefill(LLM, prompt, batch=2).total
        assert call.prefill.least_flops == language_prefill(LLM, prompt, batch=2, causal=True).total
        assert call.decode.flops == call.decode.least_flops == language_decode(LLM, prompt, batch=2).total
        assert call.to_first_token == (call.vision, call.projector, call.prefill)
    assert [name for name, _, _ in work.parts] == ["vision", "projector", "prefill", "decode"]


def test_bytes_by_hand():
    """One video of two frames, nothing merged in the tower, in half precision; 3 text tokens, 18 patches."""
    config = EarlyTomConfig(
        retain=1.0, frames=2, merge_layers=(), frame_budgets=(), newline="no_token", inner=InnerMerging(1, 0.5)
    )
    work = model_work(config, SMALL, LLM, text_tokens=3, dtype="fp16").after
    assert (work.vision.weight_bytes + work.projector.weight_bytes) == 2 * weight_count(SMALL)
    visual = 2 * 9  # 6 x 6 patches, pooled to 3 x 3
    kept = 1 * (3 + visual) + 3 * (3 + visual // 2)  # a layer with all tokens, three with half of the visual ones
    keys_and_values = 2 * 2 * 6 * 2  # of a token in a layer: both, 2 heads of 6, 2 bytes
    assert work.prefill.cache_bytes == kept * keys_and_values
    assert work.decode.cache_bytes == (kept + 4) * keys_and_values  # read, and one token written in each layer
    weights = language_weight_count(LLM) - 19 * 24  # the embedding is looked up, not read
    assert work.prefill.weight_bytes == 2 * (weights + 3 * 24) and work.decode.weight_bytes == 2 * (weights + 24)
    assert work.decode.least_bytes == work.decode.weight_bytes + work.decode.cache_bytes


def test_a_tied_head_is_read_all_the_same():
    one, two = (model_work(small_config(), SMALL, replace(LLM, tied=tied)).after for tied in (True, False))
    assert one == two


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 8), st.floats(0.1, 1), st.sampled_from(["fp32", "fp16", "bf16"]))
def test_what_grows_with_videos_and_what_does_not(text, batch, retain, dtype):
    config = small_config(retain=retain * 0.5, inner=INNER)
    one, many = (model_work(config, SMALL, LLM, text_tokens=text, batch=n, dtype=dtype) for n in (1, batch))
    for alone, together in ((one.before, many.before), (one.after, many.after)):
        for (name, a), (_, b) in zip(alone.parts, together.parts):
            assert (b.flops, b.masked_flops, b.cache_bytes, b.activation_bytes) == tuple(
                batch * x for x in (a.flops, a.masked_flops, a.cache_bytes, a.activation_bytes)
            ), name
        assert alone.vision.weight_bytes == together.vision.weight_bytes
        assert alone.projector.weight_bytes == together.projector.weight_bytes
        row = (4 if dtype == "fp32" else 2) * LLM.hidden_size
        assert together.decode.weight_bytes - alone.decode.weight_bytes == (batch - 1) * row
        assert together.prefill.weight_bytes - alone.prefill.weight_bytes == (batch - 1) * text * row
    for name, before, after in one.parts:
        if name != "vision":  # in so small a tower merging costs more than it saves
            assert after.flops < before.flops and after.cache_bytes <= before.cache_bytes


def test_cost_of_the_published_settings():
    """LLaVA-OneVision-7B at .1: less than half the work, as published (61 % fewer FLOPs over tower and LLM)."""
    cost = tower_cost(preset(retain=0.1), VisionGeometry(), dtype="fp16")
    before, after = (side.flops.total + 2 * side.prefill_flops for side in (cost.before, cost.after))
    assert after / before < 0.5
    assert cost.weight_bytes == pytest.approx(830e6, rel=0.01)
    json.dumps(cost.to_dict())


def test_without_the_llms_sizes_the_tower_is_left():
    work = model_work(small_config(), SMALL, None)
    assert [name for name, _, _ in work.parts] == ["vision", "projector"]
    assert len(work.after.to_first_token) == 2 and "prefill" not in work.to_dict()


def test_an_inner_layer_that_the_llm_lacks_is_refused():
    with pytest.raises(ConfigError, match="the LLM has 4 layers"):
        model_work(small_config(inner=InnerMerging(4)), SMALL, LLM)


# The paper's formula, and what is published of it.


def test_the_released_formula():
    """What the paper's `flops.py` prints for the 7B: 40.8 and 3.4 TFLOP, and with inner merging at 18 by half 2.8."""
    llm = PUBLISHED[3584]
    sizes = (llm.hidden_size, llm.intermediate_size, llm.layers)
    assert sizes == (3584, 18944, 28)

    def layer(n):
        return 4 * n * 3584**2 + 2 * n**2 * 3584 + 2 * n * 3584 * 18944

    assert prefill_flops(6272, *sizes) == 28 * layer(6272) and round(prefill_flops(6272, *sizes) / 1e12, 1) == 40.8
    assert prefill_flops(640, *sizes) == 28 * layer(640) and round(prefill_flops(640, *sizes) / 1e12, 1) == 3.4
    merged = prefill_flops(640, *sizes, config=preset(retain=0.1))
    assert merged == 18 * layer(640) + 10 * layer(320) and round(merged / 1e12, 1) == 2.8
    assert round(merged / prefill_flops(6272, *sizes), 3) == 0.069  # HoliTom's "6.9 % of FLOPs"


def test_the_papers_totals():
    """82.6, 45.2 and 44.6: the formula for the LLM, and for 26 layers of SigLIP on 32 frames as one sequence."""
    geometry, llm = VisionGeometry(), PUBLISHED[3584]
    vision = prefill_flops(32 * geometry.patches, geometry.hidden_size, geometry.intermediate_size, geometry.layers)
    sizes = (llm.hidden_size, llm.intermediate_size, llm.layers)
    found = [
        vision + prefill_flops(6272, *sizes), vision + prefill_flops(627, *sizes),
        vision + prefill_flops(627, *sizes, config=preset(retain=0.1)),
    ]
    assert [round(total / 1e12, 1) for total in found] == [82.6, 45.2, 44.6]
    exact = tower_flops(unpruned_config(preset(retain=0.1)), geometry)  # fits as well: the page says so
    other = [total - vision + 2 * exact.vision + exact.projector for total in found]
    assert [round(total / 1e12, 1) for total in other] == [82.6, 45.2, 44.6]
