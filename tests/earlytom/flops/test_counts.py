"""The counts against what PyTorch's FlopCounterMode counts of the models themselves, to the last FLOP."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from earlytom.config import EarlyTomConfig, InnerMerging
from earlytom.errors import ConfigError
from earlytom.flops import (
    PassFlops,
    Prompt,
    cached_tokens,
    language_decode,
    language_prefill,
    language_weight_count,
    tower_flops,
    unpruned_config,
    weight_count,
)
from earlytom.language.geometry import PUBLISHED, LanguageGeometry
from earlytom.language.qwen2 import Qwen2, generate
from earlytom.tower import StaticTower
from earlytom.vision.geometry import VisionGeometry
from earlytom.vision.siglip import Vision
from tests import full_size
from tests.cases import small_clip, small_config, small_vision

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


# The tower.


@pytest.mark.parametrize("attention", ["fused", "primitives"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooling": "average", "newline": "grid"},
        {"pooling": "max"},
        {"contextual": 0.3},
        {"merge_layers": (2,), "frame_budgets": (6,)},
        {"merge_layers": (), "frame_budgets": (), "retain": 1.0},
    ],
    ids=["plain", "grid", "max", "contextual", "one layer", "unpruned"],
)
def test_the_tower_is_counted(changes, attention):
    trained = {name: changes[name] for name in ("pooling", "newline") if name in changes}
    vision, config = small_vision(**trained), small_config(**changes)
    tower = StaticTower(vision, config, batch=2, attention=attention)
    found = tower_flops(config, vision.geometry, batch=2)
    assert counted(lambda: tower(small_clip(12, videos=2))) == found.total == found.vision + found.projector
    assert sum(p.numel() for p in vision.parameters()) == weight_count(vision.geometry)
    assert sum(s.layers[1] - s.layers[0] + 1 for s in found.stages) == vision.geometry.layers
    if not config.merge_layers:
        assert found == tower_flops(unpruned_config(config), vision.geometry, batch=2)


@st.composite
def towers(draw):
    """A geometry and a configuration that fits it."""
    heads, grid, layers = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(1, 4))
    geometry = VisionGeometry(
        image_size=grid * 4 + draw(st.integers(0, 3)), patch_size=4, hidden_size=heads * draw(st.integers(1, 6)),
        heads=heads, intermediate_size=draw(st.integers(1, 20)), layers=layers, projector_size=draw(st.integers(1, 12)),
    )
    frames = draw(st.integers(1, 9))
    merges = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), max_size=3))))
    pooling = draw(st.sampled_from(["bilinear", "average", "max"]))
    budgets, most = [], frames
    for _ in merges:
        budgets.append(most := draw(st.integers(1, most)))
    retain = budgets[-1] / frames if merges else 1.0
    return geometry, EarlyTomConfig(
        retain=retain, frames=frames, merge_layers=merges, frame_budgets=tuple(budgets), pooling=pooling,
        newline=draw(st.sampled_from(["one_token", "grid", "no_token"])),
    )


@settings(max_examples=15)
@given(towers(), st.sampled_from(["fused", "primitives"]), st.integers(1, 2))
def test_any_tower_is_counted(case, attention, batch):
    geometry, config = case
    vision = Vision(geometry, config.pooling, config.newline).eval()
    tower = StaticTower(vision, config, batch=batch, attention=attention)
    frames = torch.zeros(tower.shapes.inputs["frames"][1], dtype=torch.uint8)
    assert counted(lambda: tower(frames)) == tower_flops(config, geometry, batch).total


def test_the_unpruned_vision_model_is_the_unpruned_tower():
    vision, config = small_vision(), small_config()
    clip = small_clip(12)[0]
    assert counted(lambda: vision.encode_all(clip)) == tower_flops(unpruned_config(config), vision.geometry).total


# The language model.

SIZES = LanguageGeometry(4, 24, 4, 2, 6, 40, 19)


def qwen2(sizes: LanguageGeometry, implementation: str = "sdpa", kind=Qwen2) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=sizes.tied, attn_implementation=implementation, use_sliding_window=False,
        bos_token_id=0, eos_token_id=None,
    )
    torch.manual_seed(0)
    return kind(config).eval()


def passes(model: Qwen2ForCausalLM, prompt: Prompt, *, batch: int = 1, masked: bool = False) -> list[int]:
    """FLOPs of the prefill, as generate does it, and of two decode steps; the cache's tokens in all layers."""
    past = DynamicCache(config=model.config)
    request = {"past_key_values": past, "use_cache": True, "logits_to_keep": 1}
    if isinstance(model, Qwen2) and prompt.inner is not None:
        request |= {"inner": prompt.inner, "visual_spans": [(prompt.text // 2, prompt.visual)] * batch}
    embeds = torch.randn(batch, prompt.tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def mask(tokens: int) -> dict[str, torch.Tensor]:
        return {"attention_mask": torch.ones(batch, tokens, dtype=torch.int64)} if masked else {}

    found = [counted(lambda: model(inputs_embeds=embeds, **mask(prompt.tokens), **request))]
    found.append(batch * sum(past.get_seq_length(i) for i in range(len(model.model.layers))))
    one = torch.zeros(batch, 1, dtype=torch.int64)
    found += [counted(lambda n=n: model(input_ids=one, **mask(prompt.tokens + n), **request)) for n in (1, 2)]
    return found


def expected(sizes: LanguageGeometry, prompt: Prompt, batch: int = 1) -> list[int]:
    return [
        language_prefill(sizes, prompt, batch=batch).total, batch * cached_tokens(sizes, prompt),
        *(language_decode(sizes, prompt, generated=n, batch=batch).total for n in (0, 1)),
    ]


@pytest.mark.parametrize(("implementation", "masked"), [("sdpa", True), ("eager", False)], ids=["sdpa", "eager"])
@pytest.mark.parametrize(
    "inner",
    [None, InnerMerging(2, 0.5), InnerMerging(3, 0.5, "dpc-knn"), InnerMerging(2, 0.0)],
    ids=["none", "half", "dpc-knn", "nothing goes"],
)
def test_our_qwen2_is_counted(inner, masked, implementation):
    model, prompt = qwen2(SIZES, implementation), Prompt(5, 14, inner)
    assert passes(model, prompt, batch=2, masked=masked) == expected(SIZES, prompt, 2)


def test_transformers_own_qwen2_is_counted_alike():
    prompt = Prompt(5, 14)
    assert passes(qwen2(SIZES, kind=Qwen2ForCausalLM), prompt) == expected(SIZES, prompt)


@st.composite
def languages(draw):
    kv_heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    return LanguageGeometry(
        draw(st.integers(1, 4)), heads * head_dim, heads, kv_heads, head_dim, draw(st.integers(1, 20)),
        draw(st.integers(2, 20)), draw(st.booleans()),
    )


@settings(max_examples=10)
@given(languages(), st.data())
def test_any_qwen2_is_counted(sizes, data):
    inner = None
    if sizes.layers > 1 and data.draw(st.booleans()):
        method = data.draw(st.sampled_from(["attention", "dpc-knn"]))
        inner = InnerMerging(data.draw(st.integers(1, sizes.layers - 1)), data.draw(st.floats(0, 0.95)), method)
    prompt = Prompt(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12)), inner)
    model = qwen2(sizes)
    assert passes(model, prompt) == expected(sizes, prompt)
    assert sum(p.numel() for p in model.parameters()) == language_weight_count(sizes)


def test_a_whole_answer_is_prefill_and_steps():
    """What `generate` does, with no more than one position's logits: the first token is the prefill's."""
    model, inner = qwen2(SIZES), InnerMerging(2, 0.5)
    visual = torch.randn(14, SIZES.hidden_size, generator=torch.Generator().manual_seed(2))
    prompt = Prompt(5, 14, inner)
    found = counted(lambda: generate(model, [1, 2, -200, 3, 4, 5], visual, inner=inner, max_new_tokens=4))
    steps = sum(language_decode(SIZES, prompt, generated=n).total for n in range(3))
    assert found == language_prefill(SIZES, prompt).total + steps


# What the counter cannot tell.


def test_causal_counts_the_pairs_that_the_mask_lets_through():
    inner = InnerMerging(3, 0.5)
    full, causal = (language_prefill(SIZES, Prompt(5, 14, inner), causal=c) for c in (False, True))
    pairs = [3 * sum(range(1, 20)), 1 * sum(range(1, 13))]  # a query sees the keys up to its own, in 3 layers and in 1
    assert causal.attention == 4 * SIZES.heads * SIZES.head_dim * sum(pairs)
    assert full.attention == 4 * SIZES.heads * SIZES.head_dim * (3 * 19**2 + 12**2)
    assert full == PassFlops(causal.projections, full.attention, causal.mlp, causal.merging, causal.head)


def test_published_sizes_are_those_of_the_model_cards():
    for known in full_size.PUBLISHED.values():
        ours = PUBLISHED[known.width]
        assert (ours.layers, ours.heads, ours.kv_heads, ours.intermediate_size, ours.tied) == (
            known.layers, known.heads, known.key_value_heads, known.mlp, known.tied
        )
        if known.parameters is not None:
            assert ours.vocabulary == known.vocabulary and language_weight_count(ours) == known.parameters


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_heads": 3}, "4 heads do not share 3 key/value heads evenly"),
        ({"layers": 0}, "layers is 0"),
        ({"vocabulary": None}, "vocabulary is None"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, says):
    values = SIZES.to_dict() | changes
    with pytest.raises(ConfigError, match=says):
        LanguageGeometry(**values)


def test_prompts_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="at least one token"):
        Prompt(0, 0)
    with pytest.raises(ConfigError, match=r"the LLM has 4 layers, so the layer must lie in 1\.\.3"):
        language_prefill(SIZES, Prompt(2, 8, InnerMerging(4)))
