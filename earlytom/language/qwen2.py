"""transformers' Qwen2 with inner merging: before decoder layer k the prefill loses some of its visual tokens.

Nothing is stored in the model. What a call wants travels with it (`inner`, `visual_spans`), and what a decode step must
know follows from that: the mask from layer k on is the attention mask less the columns that were merged away. Layers
below k cache all tokens, those from k on the kept ones; decoding goes on at the full rotary position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..config import InnerMerging
from ..errors import ConfigError, InputError
from ..inner import MergeRequest, Spans, check_lengths
from .cache import PromptCache, held_states
from .devices import execution_device
from .prompt import embed_batch
from .score import last_query_attention
from .versions import (
    cached_keys,
    capture_outputs,
    causal_mask,
    dynamic_cache,
    has_windows,
    layer_arguments,
    run_layer,
)


class MergingQwen2Model(Qwen2Model):
    """Qwen2Model whose forward takes `inner` and `visual_spans`. It adds no weights, buffers or attributes."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        inner: InnerMerging | None = None,
        visual_spans: Spans | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As Qwen2Model's, with merging; last_hidden_state of a prefill is [B, N', D], N' <= N, padded on the left.

        inner: what to merge, or None. visual_spans: (start, length) for each sample as columns of the padded row, of
        length 0 where there is no video; or several such pairs for each, every span merged by itself. A decode step
        takes the prefill's two again and the full attention mask. A prefill goes on behind a PromptCache that was
        rewound: what is passed is the rest of the prompt then, spans and lengths still count the whole of it.
        Raises ConfigError when the model cannot merge so, InputError when the arguments do not fit each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("pass either input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inner is not None:
            check_layer(self.config, inner)
        request = MergeRequest.of(inner, visual_spans, inputs_embeds.shape[0])
        if past_key_values is not None and not past_key_values.is_compileable:
            check_lengths([past_key_values.get_seq_length(i) for i in range(len(self.layers))], request)
        elif past_key_values is not None and request is not None:
            raise InputError("inner merging needs a cache whose layers may differ in length, such as DynamicCache")
        arguments: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": self.config.use_cache if use_cache is None else use_cache,
        }
        if request is None:
            return super().forward(**arguments, **kwargs)
        return self._forward_merging(request, **arguments, **layer_arguments(kwargs))

    @capture_outputs
    def _forward_merging(
        self,
        request: MergeRequest,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor,
        use_cache: bool,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The decoder with merging before layer k (prefill), or with the pruned mask from layer k on (decode).

        Layers may lie on several devices: accelerate brings each its inputs, and what happens between two of them
        happens where the hidden states are.
        """
        batch, queries = inputs_embeds.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = dynamic_cache(self.config)
        k = request.inner.layer
        past, past_from_k = 0, 0
        if past_key_values is not None:
            past, past_from_k = past_key_values.get_seq_length(), past_key_values.get_seq_length(k)
        tokens = past + queries
        if attention_mask is not None and attention_mask.shape != (batch, tokens):
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, with inner merging it must be "
                f"[{batch}, {tokens}]: a row for each sample, a column for each token cached or passed"
            )
        if position_ids is None:
            position_ids = torch.arange(past, tokens, device=inputs_embeds.device)[None]
        prefill = past_from_k == 0
        before = held_states(past_key_values, past) if prefill and past else None
        if not prefill:
            width = past_from_k + queries
        elif attention_mask is None:  # the usual case, in which nothing here waits for the device
            width = request.unpadded_width(tokens)
        else:
            width = request.pruned_width(attention_mask)
        mask = causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids)
        hidden = inputs_embeds  # [B, N, D]
        rotary = self.rotary_emb(hidden, position_ids)
        context: dict[str, Any] = {"cache": past_key_values, "use_cache": use_cache, **kwargs}
        # No position_ids for the layers: flash attention would read them, layer by layer, to see whether several
        # prompts are packed into the row, and take the gaps that kept tokens leave in them for such.
        below = {"attention_mask": mask, "position_embeddings": rotary, **context}
        for layer in self.layers[: k - 1]:
            hidden = run_layer(layer, hidden, **below)
        layer, score, entering = self.layers[k - 1], None, hidden
        if prefill and request.inner.as_released:
            below["attention_mask"] = self._uncausal_mask(hidden, attention_mask, past)
        hidden = run_layer(layer, hidden, **below)
        if attention_mask is not None:
            attention_mask = attention_mask.to(hidden.device)
        if prefill:
            if request.inner.method == "attention":
                keys = cached_keys(past_key_values, k - 1)
                score = last_query_attention(layer, entering, rotary, attention_mask, keys).to(hidden.device)  # [B, N]
            positions = position_ids.to(hidden.device).expand(batch, -1)
            if before is not None:
                hidden, positions = torch.cat([before[0], hidden], 1), torch.cat([before[1], positions], 1)  # [B, N, D]
            if isinstance(past_key_values, PromptCache):
                past_key_values.note_merging(k, tokens - width, None if score is None else (hidden, positions))
            hidden, positions = request.merge(hidden, score, positions, width)  # [B, N', D]
            rotary = self.rotary_emb(hidden, positions)
        pruned = None
        if attention_mask is not None or len(set(request.removed)) > 1:  # something hidden, or samples not as long
            visible = hidden.new_ones(batch, tokens, dtype=torch.bool) if attention_mask is None else attention_mask
            pruned = request.pruned_mask(visible, width)
        mask = causal_mask(self.config, hidden, pruned, past_key_values, layer=k)
        for layer in self.layers[k : self.config.num_hidden_layers]:
            hidden = run_layer(layer, hidden, attention_mask=mask, position_embeddings=rotary, **context)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values if use_cache else None
        )

    def _uncausal_mask(self, hidden: Tensor, visible: Tensor | None, past: int) -> Tensor:
        """An additive mask [B or 1, 1, 1, N] under which tokens see those after them too: quirk 3 of the released code.

        visible [B, N]: 0 for padding, which stays hidden. Raises InputError for a prefill in parts, as tokens of the
        first part cannot see the second, and ConfigError for an attention that takes no such mask.
        """
        if past:
            raise InputError("inner merging as released needs the whole prompt in one prefill, without a prefix cached")
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ConfigError(
                f"inner merging as released does not go with {self.config._attn_implementation} attention, which is "
                "causal or takes no mask: load the language model with sdpa or eager attention"
            )
        mask = hidden.new_zeros(1 if visible is None else len(visible), 1, 1, hidden.shape[1])
        if visible is None:
            return mask
        return mask.masked_fill(~visible.to(mask.device).bool()[:, None, None], torch.finfo(hidden.dtype).min)


class Qwen2(Qwen2ForCausalLM):
    """Qwen2ForCausalLM with inner merging: forward and generate take `inner` and `visual_spans` on top of their own.

    Weights and their names are Qwen2ForCausalLM's. Source: the released code's `Qwen2Model_earlytom`, without quirks 3
    and 4 (docs/method.md): the layer that scores stays causal, unless InnerMerging.as_released wants it as it was, and
    every mask fits the tokens that are left.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super(Qwen2ForCausalLM, self).__init__(config)  # past Qwen2ForCausalLM, which would build a Qwen2Model
        self.model = MergingQwen2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def device(self) -> torch.device:
        """Where a prompt enters: also of a model on several devices, and one whose embedding is offloaded."""
        return execution_device(self.model.embed_tokens)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inner: InnerMerging | None = None,
        visual_spans: Spans | None = None,
        prefilled: CausalLMOutputWithPast | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As Qwen2ForCausalLM's, with MergingQwen2Model's `inner` and `visual_spans`; logits [B, N', vocabulary].

        prefilled: what came of these very inputs_embeds before: it is returned, and nothing is computed. So a prefill
        can be started ahead of all that `generate` does before its own.
        """
        if prefilled is not None and inputs_embeds is not None:
            return prefilled
        if labels is not None and inner is not None:
            raise InputError("labels cannot go with inner merging: it works in prefill and drops some of their tokens")
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            inner=inner,
            visual_spans=visual_spans,
            **kwargs,
        )

    def generate(self, *args: Any, visual_spans: Spans | None = None, **kwargs: Any) -> Any:
        """GenerationMixin.generate with `inner` and `visual_spans` (as in forward); embeddings are always cached."""
        if visual_spans is not None:  # a tensor, so that generate repeats it for beams and several sequences
            kwargs["visual_spans"] = torch.as_tensor(visual_spans, device="cpu")
        return super().generate(*args, **kwargs)


def answer_length(language: Any, ids: Sequence[int]) -> int:
    """How many of the new ids are the answer, the token that ends it included: behind it generate puts padding."""
    ends = language.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))


def check_layer(config: Qwen2Config, inner: InnerMerging) -> None:
    """Raise ConfigError unless a model of this configuration can merge before that layer."""
    if inner.layer >= config.num_hidden_layers:
        raise ConfigError(
            f"inner merging before layer {inner.layer} cannot be: the model has {config.num_hidden_layers} layers, "
            f"so the layer must lie in 1..{config.num_hidden_layers - 1}"
        )
    if has_windows(config):
        raise ConfigError(
            "inner merging does not go with sliding-window layers, whose windows would count merged tokens as one: "
            "use a configuration with use_sliding_window=False"
        )


def generate(
    model: Any,
    prompt_ids: Sequence[int] | Tensor | Sequence[Sequence[int] | Tensor],
    visual_tokens: Tensor | Sequence[Tensor],
    *,
    inner: InnerMerging | None = None,
    max_new_tokens: int,
    do_sample: bool = False,
    **generate_kwargs: Any,
) -> Tensor:
    """Answer a prompt about a video: the new token ids, [new] int64; of a batch, [B, new], padded at the end.

    model: a Qwen2 of this module, or an object whose `language` is one. prompt_ids: ids with one -200 for the video;
    visual_tokens [V, D]: what stands there, newline included. For a batch, a list of each; lengths may differ.
    inner: merging inside the LLM, or None. generate_kwargs go to transformers' generate (streamer, temperature, ...).
    Raises InputError and ConfigError.
    """
    language = model if isinstance(model, Qwen2) else getattr(model, "language", None)
    if not isinstance(language, Qwen2):
        raise InputError(f"a {type(model).__name__} cannot generate: pass earlytom's Qwen2, or a model holding one")
    if inner is not None:
        check_layer(language.config, inner)
    if generate_kwargs.get("return_dict_in_generate"):
        raise InputError("generate returns ids only: call the language model's generate for return_dict_in_generate")
    single = isinstance(visual_tokens, Tensor)
    prompts: Any = [prompt_ids] if single else prompt_ids
    videos: Any = [visual_tokens] if single else visual_tokens
    if len(prompts) != len(videos) or not len(videos):
        raise InputError(f"{len(prompts)} prompts do not go with {len(videos)} videos: pass as many of each, 1 or more")
    ids = language.generate(
        **embed_batch(language, prompts, videos),
        inner=inner,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        **generate_kwargs,
    )
    return ids[0] if single and len(ids) == 1 else ids
