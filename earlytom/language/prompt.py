"""A question about a video -> token ids -> embeddings with the visual tokens among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2ForCausalLM

from ..errors import InputError
from .devices import execution_device

VIDEO_TOKEN = -200  # stands for the video in a prompt, as in LLaVA-NeXT
SYSTEM_PROMPT = "You are a helpful assistant."


def build_prompt(tokenizer: Any, question: str, *, system: str = SYSTEM_PROMPT) -> list[int]:
    """Token ids of a question about a video, -200 where the video stands.

    The ChatML form that LLaVA-OneVision and LLaVA-Video were trained with (`qwen_1_5` in LLaVA-NeXT's conversation.py).
    """
    before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    after = f"\n{question}<|im_end|>\n<|im_start|>assistant\n"
    first, last = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    return [*first, VIDEO_TOKEN, *last]


def embed_prompt(
    language: Qwen2ForCausalLM, prompt_ids: Sequence[int] | Tensor, visual_tokens: Tensor
) -> tuple[Tensor, tuple[int, int]]:
    """Put visual_tokens [V, D] in the place of the one -200 of prompt_ids [P]: embeddings [1, P - 1 + V, D].

    Also returns the visual span (start, length). Raises InputError on anything that does not fit.
    """
    embeds, (span,) = _embed(language, prompt_ids, [visual_tokens])
    return embeds, span


def _embed(
    language: Qwen2ForCausalLM, prompt_ids: Sequence[int] | Tensor, videos: Sequence[Tensor]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """As `embed_prompt`, for a prompt with a -200 for each of the videos: embeddings [1, N, D] and their spans."""
    table = language.get_input_embeddings()
    given = torch.as_tensor(prompt_ids)
    if given.ndim != 1 or given.is_floating_point():
        raise InputError(f"prompt_ids must be a list of token ids, not {given.dtype} of shape {tuple(given.shape)}")
    ids: list[int] = given.tolist()  # all that follows is known to Python: nothing waits for the device
    at = [place for place, token in enumerate(ids) if token == VIDEO_TOKEN]
    if len(at) != len(videos):
        raise InputError(
            f"the prompt holds {len(at)} video tokens ({VIDEO_TOKEN}), it must hold {len(videos)}: one for each video"
        )
    text = [token for token in ids if token != VIDEO_TOKEN]
    if any(token < 0 or token >= table.num_embeddings for token in text):
        raise InputError(f"a prompt id is outside of the vocabulary: ids lie in 0..{table.num_embeddings - 1}")
    cuts = [place - before for before, place in enumerate(at)]
    first, *others = table(_send(text, execution_device(table))).tensor_split(cuts)
    pieces, spans, length = [first], [], len(first)
    for tokens, words in zip(videos, others, strict=True):
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] != table.embedding_dim:
            raise InputError(
                f"visual_tokens has shape {tuple(tokens.shape)}, it must be [V, {table.embedding_dim}] with V >= 1"
            )
        spans.append((length, len(tokens)))
        pieces += [tokens.to(words), words]
        length += len(tokens) + len(words)
    return torch.cat(pieces)[None], spans


def _send(ids: list[int], device: torch.device) -> Tensor:
    """Ids on a device; on a card without waiting for what it is still doing, as a plain copy would."""
    tensor = torch.tensor(ids, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def embed_batch(
    language: Qwen2ForCausalLM,
    prompts: Sequence[Sequence[int] | Tensor],
    videos: Sequence[Tensor | Sequence[Tensor]],
) -> dict[str, Any]:
    """What Qwen2's forward and generate take for these prompts and the visual tokens of each: of one video, or several.

    inputs_embeds [B, N, D], padded on the left; attention_mask [B, N]; visual_spans int64 [B, K, 2]: (start, length) of
    each of the videos of a sample, of length 0 where it has fewer than K. Raises InputError.
    """
    samples = [
        _embed(language, ids, [tokens] if isinstance(tokens, Tensor) else tokens)
        for ids, tokens in zip(prompts, videos, strict=True)
    ]
    lengths = [embeds.shape[1] for embeds, _ in samples]
    before = [max(lengths) - length for length in lengths]
    embeds = torch.cat([pad(embeds, (0, 0, shift, 0)) for (embeds, _), shift in zip(samples, before, strict=True)])
    columns = torch.arange(max(lengths), device=embeds.device)
    spans = torch.zeros(len(samples), max(len(own) for _, own in samples), 2, dtype=torch.int64)
    for sample, ((_, own), shift) in enumerate(zip(samples, before, strict=True)):
        for k, (start, length) in enumerate(own):
            spans[sample, k] = torch.tensor([start + shift, length])
    return {
        "inputs_embeds": embeds,
        "attention_mask": (columns >= torch.tensor(before, device=embeds.device)[:, None]).long(),
        "visual_spans": spans,
    }
