"""From frames to text: whatever runs the tower, then the language model.

The tower comes as a function from uint8 frames to TowerOutputs, so that PyTorch, ONNX Runtime and TensorRT are alike
here. One video is encoded once and can be asked about as often as one likes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import TextStreamer

from .config import EarlyTomConfig, InnerMerging
from .errors import InputError
from .language.prompt import build_prompt
from .language.qwen2 import generate
from .shapes import StaticShapes
from .tower import TowerOutputs, split_videos


@dataclass(frozen=True)
class EncodedVideo:
    """One video as the language model takes it.

    tokens [N, L], newlines included and padding cut off; positions [B, n], dynamic [B], weights [B, T]: what was kept
    (see TowerOutputs); seconds: what the tower took.
    """

    tokens: Tensor
    positions: Tensor
    dynamic: Tensor
    weights: Tensor
    seconds: float


@dataclass(frozen=True)
class Answer:
    """Text and ids of one answer, and its times: prefill_seconds up to the first token, then the rest."""

    text: str
    ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone; 0 when the answer is one token."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds > 0 and len(self.ids) > 1 else 0.0


class VideoPipeline:
    """A tower and a language model that answer questions about videos.

    encoder: uint8 [V, T, H, W, 3] -> TowerOutputs, for V = shapes.batch; language: earlytom's Qwen2; tokenizer:
    transformers'; config: whose `inner` is the default of `ask`.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], TowerOutputs],
        language: Any,
        tokenizer: Any,
        config: EarlyTomConfig,
        shapes: StaticShapes,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        if shapes.batch != 1:
            raise InputError(f"the tower takes {shapes.batch} videos a call, a pipeline needs one that takes 1")
        self.encoder, self.language, self.tokenizer = encoder, language, tokenizer
        self.config, self.shapes, self.eos_token_ids = config, shapes, tuple(eos_token_ids)

    def encode(self, frames: Tensor) -> EncodedVideo:
        """Frames uint8 [T, H, W, 3] -> EncodedVideo."""
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = self.encoder(frames[None])
        (video,) = split_videos(outputs, self.config, self.shapes)
        if video.tokens.is_cuda:
            torch.cuda.synchronize(video.tokens.device)
        return EncodedVideo(*video, seconds=time.perf_counter() - start)

    def ask(
        self,
        video: EncodedVideo,
        question: str,
        *,
        max_new_tokens: int = 128,
        inner: InnerMerging | None = None,
        merge_inside: bool = True,
        on_text: Callable[[str], None] | None = None,
        **generate_kwargs: Any,
    ) -> Answer:
        """Answer `question`; `on_text` gets the text as it is made. generate_kwargs as earlytom.generate's.

        inner: merging inside the LLM (default: the configuration's); none at all without `merge_inside`.
        """
        prompt = build_prompt(self.tokenizer, question)
        clock = _Clock(self.tokenizer, on_text)
        if self.eos_token_ids:
            generate_kwargs.setdefault("eos_token_id", list(self.eos_token_ids))
            generate_kwargs.setdefault("pad_token_id", self.eos_token_ids[0])
        start = time.perf_counter()
        ids = generate(
            self.language,
            prompt,
            video.tokens.to(self.language.device),
            inner=(inner or self.config.inner) if merge_inside else None,
            max_new_tokens=max_new_tokens,
            streamer=clock,
            **generate_kwargs,
        ).tolist()
        end = time.perf_counter()
        first = clock.first if clock.first is not None else end
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, tuple(ids), first - start, end - first)


class _Clock(TextStreamer):
    """Passes text on as it is made, and remembers when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self.on_text = on_text
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        if not value.numel():  # the prompt is embeddings: generate announces it as no ids at all
            return
        if self.first is None:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text is not None and text:
            self.on_text(text)
