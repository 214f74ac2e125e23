"""Questions about videos to answers and their token counts, one after another or several at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from earlytom.errors import EarlyTomError, InputError, first_line
from earlytom.language.prompt import build_prompt
from earlytom.language.qwen2 import answer_length, generate

from .questions import VideoQuestion

if TYPE_CHECKING:
    from earlytom.pipeline import VideoPipeline


@dataclass(frozen=True)
class Reply:
    """An answer. input_tokens: text and visual tokens that entered the language model; output_tokens: that it made, the
    end of the answer among them; visual_tokens: of the input, newlines among them; seconds: reading the file included.
    """

    text: str
    input_tokens: int
    output_tokens: int
    visual_tokens: int
    seconds: float


def batches(questions: Sequence[VideoQuestion], size: int) -> Iterator[Sequence[VideoQuestion]]:
    """At most `size` questions at a time, in order, answered with the same settings."""
    start = 0
    while start < len(questions):
        end = start + 1
        while end < min(len(questions), start + size) and questions[end].generation == questions[start].generation:
            end += 1
        yield questions[start:end]
        start = end


def answer(pipeline: VideoPipeline, questions: Sequence[VideoQuestion]) -> list[Reply]:
    """Answer questions that share their settings; of several, the language model makes a batch.

    A single one starts from the keys and values of the last, if it is about the same video. Raises EarlyTomError, with
    the document that could not be asked about.
    """
    return [_one(pipeline, questions[0])] if len(questions) == 1 else _several(pipeline, questions)


def _one(pipeline: VideoPipeline, question: VideoQuestion) -> Reply:
    start = time.perf_counter()
    generation = question.generation
    try:
        encoded = pipeline.encode(question.video)
        found = pipeline.ask(
            encoded, question.text, max_new_tokens=generation.max_new_tokens, **generation.keywords()
        )
    except EarlyTomError as error:
        raise InputError(f"{question.where}: {first_line(error)}") from error
    visual = len(encoded.tokens)
    entered = len(build_prompt(pipeline.model.tokenizer, question.text)) - 1 + visual
    seconds = time.perf_counter() - start
    return Reply(generation.cut(found.text), entered, len(found.ids), visual, seconds)


def _several(pipeline: VideoPipeline, questions: Sequence[VideoQuestion]) -> list[Reply]:
    start = time.perf_counter()
    language, tokenizer = pipeline.model.language, pipeline.model.tokenizer
    generation = questions[0].generation
    prompts, videos = [], []
    for question in questions:
        try:
            videos.append(pipeline.encode(question.video).tokens.to(language.device))
        except EarlyTomError as error:
            raise InputError(f"{question.where}: {first_line(error)}") from error
        prompts.append(build_prompt(tokenizer, question.text))
    rows = generate(
        language, prompts, videos, inner=pipeline.config.inner, max_new_tokens=generation.max_new_tokens,
        **generation.keywords(),
    ).tolist()
    seconds = (time.perf_counter() - start) / len(questions)
    replies = []
    for row, prompt, tokens in zip(rows, prompts, videos, strict=True):
        length = answer_length(language, row)
        text = generation.cut(tokenizer.decode(row[:length], skip_special_tokens=True))
        replies.append(Reply(text, len(prompt) - 1 + len(tokens), length, len(tokens), seconds))
    return replies
