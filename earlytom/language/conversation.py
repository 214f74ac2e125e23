"""Questions about videos, answered one after another: a video that was asked about already is not read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..config import InnerMerging
from .cache import PromptCache
from .decode import CompiledDecoder
from .prompt import embed_prompt
from .qwen2 import Qwen2, check_layer, generate
from .versions import FIVE, has_windows

# Arguments of generate that leave one sequence, a token at a time, in the cache that it is given. All others (beams,
# another cache, assistants, ...) are answered as if they were the first.
SIMPLE = {
    "streamer", "logits_processor", "stopping_criteria", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "typical_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens",
    "eos_token_id", "pad_token_id",
}


@dataclass(frozen=True)
class Remembered:
    """A video that was asked about: its tokens, the prompt's ids up to and with it, the merging, what is cached, and
    where and in which dtype the model was then."""

    visual_tokens: Tensor
    before: tuple[int, ...]
    inner: InnerMerging | None
    cache: PromptCache
    weights: tuple[torch.device, torch.dtype]


class Conversation:
    """Answers as `generate` does; the last video's keys and values stay, and later questions about it start from them.

    language: a Qwen2; decoder: what makes the tokens after the first, transformers' own loop without. What stays is of
    one video, see PromptCache: of a 7B model in 16 bits 57 KB for each token of the prompt up to the video's end, 44 KB
    with merging by attention before layer 18, and until the next question the last one's own tokens and its answer.
    """

    def __init__(self, language: Qwen2, decoder: CompiledDecoder | None = None) -> None:
        self.language, self.decoder = language, decoder
        self._last: Remembered | None = None

    def forget(self) -> None:
        """Free what is remembered of the last video."""
        self._last = None

    def answer(
        self,
        prompt_ids: Sequence[int],
        visual_tokens: Tensor,
        *,
        inner: InnerMerging | None = None,
        max_new_tokens: int,
        reuse: bool = True,
        **generate_kwargs: Any,
    ) -> Tensor:
        """The new token ids, [new] int64, of a prompt with one -200; arguments and errors as earlytom.generate's.

        The same tensor `visual_tokens` again, behind the same words and with the same merging, is read from the cache.
        The logits are those of `generate` but for the order of sums, so ids can differ at near ties only. Without
        `reuse` nothing is taken from the last question, and nothing kept for the next; nor with merging as released,
        where what a video's tokens become hangs on the question behind them.
        """
        language = self.language
        if not self._simple(generate_kwargs):
            settings = generate_kwargs | {"inner": inner, "max_new_tokens": max_new_tokens}
            return generate(language, prompt_ids, visual_tokens, **settings)
        if inner is not None:
            check_layer(language.config, inner)
        reuse = reuse and not (inner is not None and inner.as_released)
        embeds, span = embed_prompt(language, prompt_ids, visual_tokens)
        before = tuple(prompt_ids)[: span[0] + 1]
        taken = self._take(visual_tokens, before, inner) if reuse else None
        cache = PromptCache(config=language.config) if taken is None else taken
        first = prefill(language, embeds, span, inner, cache)
        settings = {"do_sample": False, **generate_kwargs}
        if self.decoder is not None:
            settings |= {"custom_generate": self.decoder, "listener": settings.pop("streamer", None)}
        (ids,) = language.generate(
            inputs_embeds=embeds, past_key_values=cache, prefilled=first, inner=inner, visual_spans=[span],
            max_new_tokens=max_new_tokens, **settings,
        )
        if reuse:
            cache.rewind(sum(span))
            self._last = Remembered(visual_tokens, before, inner, cache, self._weights())
        return ids

    def _take(self, visual_tokens: Tensor, before: tuple[int, ...], inner: InnerMerging | None) -> PromptCache | None:
        """The cache of the last video, if it is this one; nothing is left, in case what now comes is interrupted."""
        last, self._last = self._last, None
        if last is None or last.visual_tokens is not visual_tokens or (last.before, last.inner) != (before, inner):
            return None
        return last.cache if last.weights == self._weights() else None

    def _weights(self) -> tuple[torch.device, torch.dtype]:
        """What tells that the model was moved or cast since: one weight's place, as others may lie elsewhere."""
        weight = self.language.lm_head.weight
        return weight.device, weight.dtype

    def _simple(self, kwargs: dict[str, Any]) -> bool:
        """Whether generate, asked so, makes one sequence in a cache that can be rewound; before transformers 5 none."""
        settings = self.language.generation_config
        single = (settings.num_beams or 1) == 1 and (settings.num_return_sequences or 1) == 1
        full = not has_windows(self.language.config)
        return FIVE and full and single and settings.cache_implementation is None and set(kwargs) <= SIMPLE


@torch.no_grad()
def prefill(
    language: Qwen2, embeds: Tensor, span: tuple[int, int], inner: InnerMerging | None, cache: PromptCache
) -> CausalLMOutputWithPast:
    """Run a prompt's embeddings [1, N, D], with its visual span, as far as the cache does not hold them: logits [1, 1,
    vocabulary] of the last token.

    Every size is known to Python: from the first operation to the last the host waits for nothing on the device.
    """
    done, total = cache.get_seq_length(), embeds.shape[1]
    varlen: dict[str, Any] = {}
    if inner is None and language.config._attn_implementation == "flash_attention_2":
        # or each layer would read the positions, to see whether several prompts are packed into the row
        ends = torch.arange(2, dtype=torch.int32, device=embeds.device)
        varlen = {"cu_seq_lens_q": ends * (total - done), "cu_seq_lens_k": ends * total}
        varlen |= {"max_length_q": total - done, "max_length_k": total}
    output: CausalLMOutputWithPast = language(
        inputs_embeds=embeds[:, done:], past_key_values=cache, use_cache=True, logits_to_keep=1, inner=inner,
        visual_spans=[span], **varlen,
    )
    return output
