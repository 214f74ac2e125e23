"""Decoding in fixed shapes: one compiled step over a static cache, replayed for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ConfigError
from .devices import has_hooks
from .versions import causal_mask, needs_five

LEAST = 128  # tokens of a static layer: such a power of two that questions of any usual length share one compiled step
Step = Callable[[Any, Tensor, Cache, int], Tensor]


class CompiledDecoder:
    """What transformers' generate takes as `custom_generate`: its loop of one sequence, after a prefill, compiled.

    The prefill stays what it is, with its dynamic cache; its keys and values are copied into static layers, those from
    the merging layer on shorter than those below it. torch.compile makes one graph of a step, on a card a CUDA graph
    (mode reduce-overhead). The first answer pays for the compilation, and so does one that outgrows the static layers.
    language: a Qwen2; compiler: in place of torch.compile. Raises ConfigError on attention that cannot be compiled, and
    on a model that is spread over devices.
    """

    def __init__(self, language: Any, compiler: Callable[[Step], Step] | None = None) -> None:
        needs_five("compiled decoding")
        attention = language.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ConfigError(f"compiled decoding needs attention sdpa or eager, not {attention}: its shapes are fixed")
        if has_hooks(language):  # accelerate keeps them out of graphs
            raise ConfigError("compiled decoding needs the whole model on one device, not spread by a device map")
        self.language = language
        self.step = (compiler or _compile)(decode_step)
        self.cache: StaticCache | None = None  # kept: a CUDA graph is bound to the addresses of its tensors

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        prefilled: CausalLMOutputWithPast,
        listener: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """input_ids [1, 0], the new ids so far -> [1, new].

        prefilled: the prefill's output, whose cache it holds; listener: a streamer (transformers keeps one that is
        named so from a custom loop). Source of the loop: GenerationMixin._sample.
        """
        past: Cache = prefilled.past_key_values
        lengths = [past.get_seq_length(i) for i in range(len(past))]
        merging = next((i for i, length in enumerate(lengths) if length != lengths[0]), 0)
        cache = self._filled(past, lengths, generation_config.max_length - input_ids.shape[1])
        logits = prefilled.logits
        while True:
            # a copy: the next replay of a CUDA graph writes over what the last one gave
            scores = logits_processor(input_ids, logits[:, -1].to(torch.float32, copy=True))  # [1, vocabulary]
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)  # [1, 1]
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=1)
            if listener is not None:
                listener.put(token[0].cpu())
            if stopping_criteria(input_ids, None).all():
                break
            logits = self.step(model, token, cache, merging)
        if listener is not None:
            listener.end()
        return input_ids

    def _filled(self, source: Cache, lengths: list[int], new: int) -> StaticCache:
        """The static cache with the keys and values of `source` and room for `new` tokens more."""
        had = [0] * len(lengths) if self.cache is None else [layer.max_cache_len for layer in self.cache.layers]
        if self.cache is None or any(room < length + new for room, length in zip(had, lengths)):
            from transformers.cache_utils import StaticLayer  # older releases have none

            self.cache = StaticCache(config=self.language.config, max_cache_len=LEAST)
            self.cache.layers = [StaticLayer(_room(length + new, room)) for length, room in zip(lengths, had)]
            with torch.inference_mode(False):  # or they could not be written to outside of it
                for static, layer in zip(self.cache.layers, source.layers):
                    static.lazy_initialization(layer.keys, layer.values)
        for static, layer, length in zip(self.cache.layers, source.layers, lengths):
            # What lies behind is of an earlier answer: finite, and hidden by the mask until it is written over.
            static.keys[:, :, :length].copy_(layer.keys)
            static.values[:, :, :length].copy_(layer.values)
            static.cumulative_length.fill_(length)
        return self.cache


def decode_step(language: Any, token: Tensor, cache: Cache, merging: int) -> Tensor:
    """Logits [1, 1, vocabulary] after one more token [1, 1], which is added to the cache, a static one as well.

    merging: the first layer whose cache is shorter than the first one's; 0 for none.
    """
    body = language.model
    hidden = body.embed_tokens(token)  # [1, 1, D]
    rotary = body.rotary_emb(hidden, torch.arange(1, device=token.device)[None] + cache.get_seq_length(0))
    below, above = (causal_mask(body.config, hidden, None, cache, layer) for layer in (0, merging))
    for index, layer in enumerate(body.layers):
        mask = above if index >= merging else below
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=True)
    logits: Tensor = language.lm_head(body.norm(hidden))
    return logits


def _room(tokens: int, least: int) -> int:
    """A power of two that holds so many tokens, and no fewer than before."""
    return max(LEAST, least, 1 << (tokens - 1).bit_length())


def _compile(step: Step) -> Step:
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def run(language: Any, token: Tensor, cache: Cache, merging: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step gave is no longer needed
        logits: Tensor = compiled(language, token, cache, merging)
        return logits

    return run
