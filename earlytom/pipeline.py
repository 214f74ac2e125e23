"""From a video to text: whatever runs the tower, then the language model.

The tower comes as a function from uint8 frames to TowerOutputs, so that PyTorch, ONNX Runtime and TensorRT are alike
here. One video is encoded once, and goes through the language model once, however many questions are asked about it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation.streamers import TextStreamer

from .config import EarlyTomConfig, InnerMerging
from .errors import CheckpointError, InputError
from .language.conversation import Conversation
from .language.decode import CompiledDecoder
from .language.prompt import build_prompt
from .tower import TowerOutputs, split_videos
from .video import read_frames
from .vision.geometry import pooled_grid

Frames = Tensor | NDArray[np.uint8]


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

    encoder: uint8 [1, T, H, W, 3] -> TowerOutputs: a tower, an engine's Runner, or any function; model: what
    `earlytom.load` gives, or whatever has its `language`, `tokenizer` and `geometry`; config: what the encoder was made
    with, whose `inner` is the default of `ask`; compile: decode with a static cache and torch.compile, see
    CompiledDecoder. Closing the pipeline closes a Runner. Raises CheckpointError when there is no language model or no
    tokenizer, ConfigError when what should be compiled cannot be.
    """

    def __init__(self, encoder: Any, model: Any, config: EarlyTomConfig, *, compile: bool = False) -> None:
        if model.language is None or model.tokenizer is None:
            lacks = "language model was loaded" if model.language is None else "tokenizer is in the checkpoint"
            raise CheckpointError(f"no {lacks}, so a question cannot be put to it")
        self.encoder, self.model, self.config = encoder, model, config
        self._run: Callable[[Tensor], TowerOutputs] = getattr(encoder, "run", encoder)
        self._last: tuple[tuple[Any, ...], EncodedVideo] | None = None  # the file asked about last
        self._conversation = Conversation(model.language, CompiledDecoder(model.language) if compile else None)

    def __enter__(self) -> VideoPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the engine holds, and what is remembered of the last video."""
        self.forget()
        if hasattr(self.encoder, "close"):
            self.encoder.close()

    def forget(self) -> None:
        """Free what is remembered of the last video: a file's visual tokens, its keys and values."""
        self._last = None
        self._conversation.forget()

    def encode(self, video: str | Path | Frames) -> EncodedVideo:
        """A video file, or frames uint8 [T, H, W, 3] as `read_frames` gives them -> EncodedVideo.

        The file encoded last is not encoded again unless it changed. Warns of a damaged file, and of one with fewer
        frames than T, some of which are then repeated. Raises VideoError, InputError.
        """
        if not isinstance(video, (str, Path)):
            return self._encode(video)
        key: tuple[Any, ...] = ()
        try:
            stat = Path(video).stat()
            key = (str(Path(video).resolve()), stat.st_mtime_ns, stat.st_size)
        except OSError:  # read_frames says what is wrong
            pass
        if self._last is None or self._last[0] != key:
            read = read_frames(video, frames=self.config.frames, size=self.model.geometry.image_size)
            for note in read.notes:
                warnings.warn(note, stacklevel=2)
            self._last = (key, self._encode(torch.from_numpy(read.frames)))
        return self._last[1]

    def _encode(self, frames: Frames) -> EncodedVideo:
        side = self.model.geometry.image_size
        expected = [self.config.frames, side, side, 3]
        known = isinstance(frames, (Tensor, np.ndarray))
        given = f"{frames.dtype} {list(frames.shape)}".removeprefix("torch.") if known else type(frames).__name__
        if given != f"uint8 {expected}":
            raise InputError(
                f"frames are {given}, they must be uint8 {expected}: earlytom.read_frames makes them from a file"
            )
        if isinstance(frames, np.ndarray):
            frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = self._run(frames[None])
        grid = pooled_grid(self.model.geometry.grid, self.config.pooling)
        (video,) = split_videos(outputs, self.config, grid)
        if video.tokens.is_cuda:
            torch.cuda.synchronize(video.tokens.device)
        return EncodedVideo(*video, seconds=time.perf_counter() - start)

    def ask(
        self,
        video: str | Path | Frames | EncodedVideo,
        question: str,
        *,
        max_new_tokens: int = 128,
        inner: InnerMerging | None = None,
        merge_inside: bool = True,
        on_text: Callable[[str], None] | None = None,
        reuse: bool = True,
        **generate_kwargs: Any,
    ) -> Answer:
        """Answer `question` about a video, see `encode`; `on_text` gets the text as it is made.

        inner: merging inside the LLM (default: the configuration's); none at all without `merge_inside`. A question
        about the video of the last one, the same EncodedVideo or file, starts from its keys and values; without
        `reuse` none are taken or kept, see Conversation.answer. generate_kwargs: as earlytom.generate's.
        """
        tokenizer = self.model.tokenizer
        prompt = build_prompt(tokenizer, question)
        encoded = video if isinstance(video, EncodedVideo) else self.encode(video)
        clock = _Clock(tokenizer, on_text)
        start = time.perf_counter()
        ids = self._conversation.answer(
            prompt,
            encoded.tokens,
            inner=(inner or self.config.inner) if merge_inside else None,
            max_new_tokens=max_new_tokens,
            reuse=reuse,
            streamer=clock,
            **generate_kwargs,
        ).tolist()
        end = time.perf_counter()
        first = clock.first if clock.first is not None else end
        return Answer(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), first - start, end - first)


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
