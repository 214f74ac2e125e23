"""Every row of an evaluation on every question of a suite: a row is anything that makes visual tokens of frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import InnerMerging
from ..errors import CheckpointError, InputError
from ..language.conversation import Conversation
from ..language.prompt import build_prompt
from ..video.resize import resize_frames
from .draw import draw
from .questions import Question
from .report import Given, Report, RowReport, right
from .suite import Asked, Suite
from .world import SIZE, Clip

MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class Row:
    """One way to make visual tokens of a clip.

    tower: uint8 frames [T, H, W, 3] -> visual tokens [N, L], newlines included, or whatever `choose` makes them of;
    choose: (what the tower gave, the clip's index) -> visual tokens; inner: merging inside the LLM, or None. method,
    retain, budgets: what the report says and compares by. Rows that hold the same `tower` object share its work; a
    tower that had seconds of its work done by another's tells them as `saved`, if it likes.
    """

    name: str
    tower: Callable[[Tensor], Any]
    choose: Callable[[Any, int], Tensor] | None = None
    inner: InnerMerging | None = None
    method: str = ""
    retain: float | None = None
    budgets: tuple[int, ...] = ()


@dataclass(frozen=True)
class ClipAnswers:
    """What one row made of one clip. clip: its index; seconds: of the tower; tokens: visual tokens, newlines included.
    """

    row: str
    budgets: tuple[int, ...]
    clip: int
    tokens: int
    seconds: float
    given: tuple[Given, ...]


def evaluate(
    model: Any, suite: Suite, rows: Sequence[Row], progress: Callable[[Asked, list[ClipAnswers]], None] | None = None,
    *, done: Sequence[ClipAnswers] = (), max_new_tokens: int = MAX_NEW_TOKENS,
) -> Report:
    """Ask every row every question, clip by clip, and answer greedily. model: what `earlytom.load` gives.

    progress: is told of each clip and its new answers; done: answers of an earlier run, which are not asked again.
    Raises CheckpointError, ConfigError, InputError.
    """
    check_model(model)
    if len({row.name for row in rows}) < len(rows):
        raise InputError(f"each row needs a name of its own, these are {', '.join(row.name for row in rows)}")
    found: dict[str, list[ClipAnswers]] = {row.name: [] for row in rows}
    known = {(answers.row, answers.budgets, answers.clip): answers for answers in done}
    for asked in suite.asked:
        kept = {row.name: known.get((row.name, row.budgets, asked.index)) for row in rows}
        new = list(ask(model, asked, [row for row in rows if kept[row.name] is None], max_new_tokens))
        for answers in (*filter(None, kept.values()), *new):
            found[answers.row].append(answers)
        if progress is not None:
            progress(asked, new)
    return Report(suite, tuple(_row_report(row, found[row.name]) for row in rows))


def check_model(model: Any) -> None:
    if model.vision is None or model.language is None or model.tokenizer is None:
        raise CheckpointError("an evaluation needs a checkpoint's tower, its language model and its tokenizer")


def ask(
    model: Any, asked: Asked, rows: Sequence[Row], max_new_tokens: int = MAX_NEW_TOKENS
) -> Iterator[ClipAnswers]:
    """The rows' answers to the questions about one clip, in order."""
    if not rows:
        return
    frames = torch.from_numpy(frames_of(asked.clip, model.geometry.image_size))
    made: dict[int, tuple[Any, float]] = {}  # by tower
    for row in rows:
        with torch.inference_mode():
            if id(row.tower) not in made:
                start = time.perf_counter()
                output = row.tower(frames)
                if model.vision.device.type == "cuda":
                    torch.cuda.synchronize()
                made[id(row.tower)] = output, time.perf_counter() - start + getattr(row.tower, "saved", 0.0)
            output, seconds = made[id(row.tower)]
            tokens = row.choose(output, asked.index) if row.choose else output
        given = answer(model, tokens, asked.questions, row.inner, max_new_tokens)
        yield ClipAnswers(row.name, row.budgets, asked.index, len(tokens), seconds, given)


def frames_of(clip: Clip, side: int) -> NDArray[np.uint8]:
    """A clip as a tower of side x side pixels takes it: uint8 [T, side, side, 3]."""
    frames = draw(clip)
    return frames if side == SIZE else resize_frames(frames, side)


def answer(
    model: Any,
    tokens: Tensor,
    questions: Sequence[Question],
    inner: InnerMerging | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> tuple[Given, ...]:
    """Greedy answers to questions about one video [N, L], which is prefilled once."""
    talk = Conversation(model.language)
    found = []
    for question in questions:
        prompt = build_prompt(model.tokenizer, question.prompt)
        ids = talk.answer(prompt, tokens, inner=inner, max_new_tokens=max_new_tokens).tolist()
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        found.append(Given(text, tuple(ids), right(text, question)))
    return tuple(found)


def _row_report(row: Row, clips: Sequence[ClipAnswers]) -> RowReport:
    return RowReport(
        row.name, row.method, row.retain, row.inner, row.budgets,
        tokens=sum(clip.tokens for clip in clips) / len(clips),
        seconds=sum(clip.seconds for clip in clips) / len(clips),
        given=tuple(given for clip in clips for given in clip.given),
    )
