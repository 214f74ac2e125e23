"""Several questions about one video: what stands before the question goes through the language model once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import ConfigError
from .prompt import VIDEO_TOKEN, embed_prompt
from .qwen2 import ending_ids


class SharedPrefix:
    """Keys and values of a prompt up to and with its video, from which any number of questions are answered.

    Without inner merging, which looks at the question. language: a Qwen2; before: the prompt's ids up to and with the
    one -200; visual_tokens [V, D]. Greedy answers are those of `generate` but for near ties: sums run in another order.
    Raises InputError, and ConfigError for a model with sliding windows, whose cache forgets.
    """

    def __init__(self, language: Any, before: Sequence[int], visual_tokens: Tensor) -> None:
        if "sliding_attention" in (language.config.layer_types or ()):
            raise ConfigError("a model with sliding-window layers cannot share a prefix: use generate instead")
        self.language, self.ends = language, ending_ids(language)
        with torch.inference_mode():
            embeds, _ = embed_prompt(language, before, visual_tokens.to(language.device))
            cache = DynamicCache(config=language.config)
            language.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        self.past = [(layer.keys, layer.values) for layer in cache.layers]

    @torch.inference_mode()
    def answer(self, after: Sequence[int], *, max_new_tokens: int) -> list[int]:
        """The likeliest continuation of the prefix and `after`: new ids, the one that ends the answer included."""
        cache = DynamicCache(config=self.language.config)
        for index, (keys, values) in enumerate(self.past):
            cache.update(keys, values, index)  # copies them
        ids: list[int] = []
        step = torch.tensor([list(after)], device=self.language.device)
        while len(ids) < max_new_tokens and not self.ends & set(ids[-1:]):
            logits = self.language(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids.append(int(logits[0, -1].float().argmax()))
            step = step.new_tensor([ids[-1:]])
        return ids


def split_prompt(prompt_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """A prompt's ids up to and with the video, and those after it."""
    at = list(prompt_ids).index(VIDEO_TOKEN) + 1
    return list(prompt_ids[:at]), list(prompt_ids[at:])
