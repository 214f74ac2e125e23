"""Random models in published shapes: the shapes are the published ones, the weights the same every time."""

from __future__ import annotations

import pytest
import torch

from earlytom.checkpoint.random_model import SIZES, random_model
from earlytom.errors import ConfigError
from earlytom.language.prompt import VIDEO_TOKEN, build_prompt
from earlytom.vision.geometry import VisionGeometry
from tests.full_size import PUBLISHED


@pytest.mark.parametrize("size", list(SIZES))
def test_shapes_are_published(size: str) -> None:
    published, ours = PUBLISHED[f"lmms-lab/llava-onevision-qwen2-{size}-ov"], SIZES[size]
    assert ours.vision == VisionGeometry(projector_size=published.width)
    language = ours.language
    assert (language.layers, language.hidden_size, language.heads, language.kv_heads) == (
        published.layers, published.width, published.heads, published.key_value_heads
    )
    assert (language.intermediate_size, language.vocabulary, language.tied) == (
        published.mlp, published.vocabulary, published.tied
    )


def test_a_model_is_whole_and_the_same_every_time() -> None:
    model, other = random_model("tiny"), random_model("tiny")
    assert model.vision is not None and model.language is not None and model.identity == other.identity
    for part in ("vision", "language"):
        one, two = (getattr(m, part).state_dict() for m in (model, other))
        assert all(torch.equal(one[name], two[name]) and not one[name].is_meta for name in one)
    table = model.language.get_input_embeddings().weight
    assert model.language.lm_head.weight.data_ptr() == table.data_ptr(), "a tied head is the embedding, not a copy"
    assert not [name for name, buffer in model.language.named_buffers() if buffer.is_meta]
    prompt = build_prompt(model.tokenizer, "What happens in this video?")
    assert max(prompt) < len(table) and prompt.count(VIDEO_TOKEN) == 1


def test_dtypes_and_parts_are_those_asked_for() -> None:
    model = random_model("tiny", dtype=torch.float16, language_dtype=torch.bfloat16)
    assert model.vision is not None and model.vision.dtype == torch.float16
    assert {p.dtype for p in model.language.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    alone = random_model("tiny", parts=("vision",))
    assert alone.language is None and alone.tokenizer is None


def test_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it must be one of 0\.5b, 7b"):
        random_model("13b")
