"""A shared prefix answers as generate does."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config

from earlytom.errors import ConfigError, InputError
from earlytom.language.prefix import SharedPrefix, split_prompt
from earlytom.language.prompt import VIDEO_TOKEN
from earlytom.language.qwen2 import Qwen2, generate

BEFORE = [5, 6, 7, VIDEO_TOKEN]
QUESTIONS = [[11, 12, 13], [14], [11, 12, 13, 15, 16, 17, 18]]


def language(**changes: object) -> Qwen2:
    torch.manual_seed(0)
    model = Qwen2(
        Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, attn_implementation="sdpa", initializer_range=0.5, **changes,
        )
    ).eval()
    model.generation_config.eos_token_id = [3, 9]
    model.generation_config.pad_token_id = 3
    return model


def test_ids_are_those_of_generate_whatever_was_asked_before() -> None:
    model, video = language(), torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    prefix = SharedPrefix(model, BEFORE, video)
    for question in QUESTIONS + QUESTIONS[::-1]:
        ids = prefix.answer(question, max_new_tokens=12)
        assert ids == generate(model, [*BEFORE, *question], video, max_new_tokens=12).tolist()
    assert prefix.past[0][0].shape[2] == len(BEFORE) - 1 + len(video)  # nothing of a question stays
    model.generation_config.eos_token_id = ids[2]
    stopped = SharedPrefix(model, BEFORE, video).answer(question, max_new_tokens=12)
    assert stopped == ids[: ids.index(ids[2]) + 1]
    assert stopped == generate(model, [*BEFORE, *question], video, max_new_tokens=12).tolist()
    assert prefix.answer(question, max_new_tokens=1) == ids[:1]


def test_a_prompt_is_split_after_its_video() -> None:
    assert split_prompt([*BEFORE, 11, 12]) == (BEFORE, [11, 12])


def test_refusals() -> None:
    with pytest.raises(InputError, match="visual_tokens"):
        SharedPrefix(language(), BEFORE, torch.zeros(4, 8))
    sliding = language(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ConfigError, match="sliding"):
        SharedPrefix(sliding, BEFORE, torch.zeros(4, 32))
