"""The measurement itself: all contestants in one process, round by round, from frames to the last token.

A tower's visual tokens are put to the language model once for each row that needs them, so vision is not run again for
inner merging: those rows share the round's time of vision. The card is idle when either begins, as in VideoPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from earlytom.config import EarlyTomConfig, InnerMerging
from earlytom.errors import ConfigError, EarlyTomError, EngineError, first_line
from earlytom.flops import prefill_flops, tower_flops, unpruned_config
from earlytom.language.conversation import Conversation
from earlytom.language.qwen2 import generate
from earlytom.language.versions import has_windows

from .contestants import Entrant, Subject, Tower, open_contestant
from .memory import Memory
from .results import NotRun, Row, Span
from .settings import CONTESTANTS, STATIC, WHOLE, Settings
from .stopwatch import AFTER, BEFORE, FIRST_TOKEN, GENERATION, PREFILL, SPLICE, FirstToken, Seam, Stopwatch, marking
from .timing import interleaved

READING = "(reading)"  # the video file, which every round reads once


@dataclass(frozen=True)
class Outcome:
    """One row in one round; fields as in Row."""

    spans: Mapping[str, float]
    visual_tokens: int
    ids: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()
    memory: int | None = None
    inner: bool = False
    second: bool = False


def hold_contest(
    subject: Subject, settings: Settings, frames: Tensor, *, read: Callable[[], dict[str, float]] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[tuple[Row, ...], tuple[NotRun, ...]]:
    """Rows of all contestants on frames uint8 [V, T, H, W, 3] on a CPU, and those that could not take part.

    read: reads the video again and says what each part of that took, in ms; tell: is told how it goes, line by line. On
    a card, it must be the current one. Raises EngineError when nobody could.
    """
    inner = wanted_inner(settings, subject.config)
    with ExitStack() as stack, torch.inference_mode():
        entrants: dict[str, Entrant] = {}
        not_run: dict[str, str] = {}
        for name in settings.names:
            tell(f"opening {name}")
            try:
                entrants[name] = open_contestant(name, subject, stack)
            except EarlyTomError as error:
                not_run[name] = str(error)
                tell(f"{name}: not run: {error}")
        course = Course(subject, settings, frames, entrants, inner)

        def call(name: str, index: int) -> dict[str, Outcome]:
            if name == READING:
                return {READING: Outcome(read() if read is not None else {}, 0)}
            if name in not_run:
                return {}
            try:
                made = course.run(name, remember=index == settings.warm_up - 1)
            except (EarlyTomError, RuntimeError) as error:
                if not isinstance(error, EarlyTomError) and not out_of_memory(error):
                    raise
                not_run[name] = f"it failed: {first_line(error)}"
                made = {}
            times = ", ".join(f"{row} {sum(o.spans.values()):.0f} ms" for row, o in made.items())
            tell(f"round {index + 1}: {times or f'{name}: {not_run[name]}'}")
            return made

        names = (READING, *entrants) if entrants else ()
        rounds = interleaved(names, call, runs=settings.runs, warm_up=settings.warm_up, seconds=settings.seconds)
    reading = [made[READING].spans for made in rounds.pop(READING, [])]
    rows = [
        row for name, made in rounds.items() if name not in not_run
        for row in _rows(name, made, reading, course)
    ]
    if not rows:
        raise EngineError(f"nothing could be measured: {'; '.join(f'{n}: {why}' for n, why in not_run.items())}")
    return tuple(rows), tuple(NotRun(name, not_run[name]) for name in settings.names if name in not_run)


def wanted_inner(settings: Settings, config: EarlyTomConfig) -> tuple[InnerMerging | None, ...]:
    """The kinds of merging inside the LLM that each tower's tokens are put through. Raises ConfigError."""
    if settings.inner == "on" and config.inner is None:
        raise ConfigError("there is no inner merging in this configuration: --inner off")
    kinds = {"off": (None,), "on": (config.inner,), "both": (None, config.inner)}
    return tuple(dict.fromkeys(kinds[settings.inner]))


class Course:
    """What a contestant goes through in a round. memory: bytes of a row, remembered from the round that measured it."""

    def __init__(
        self, subject: Subject, settings: Settings, frames: Tensor, entrants: Mapping[str, Entrant],
        inner: Sequence[InnerMerging | None],
    ) -> None:
        self.inner = inner
        self.subject, self.settings, self.frames, self.entrants = subject, settings, frames, entrants
        self.watch, self._memory = Stopwatch(subject.device), Memory(subject.device)
        self.memory: dict[str, int] = {}
        first = next((name for name in (STATIC, *entrants) if isinstance(entrants.get(name), Tower)), None)
        self.asked_again = first if None in self.inner and not settings.vision_only else None

    def run(self, name: str, *, remember: bool = False) -> dict[str, Outcome]:
        """Row -> what came of it. remember: measure memory as well, which on a CPU costs time."""
        entrant = self.entrants[name]
        made = self._tower(name, entrant, remember) if isinstance(entrant, Tower) else self._whole(name, remember)
        for row, outcome in made.items():
            if outcome.memory is not None:
                self.memory[row] = outcome.memory
        return made

    def _whole(self, name: str, remember: bool) -> dict[str, Outcome]:
        model: Any = self.entrants[name]
        self._begin(remember)
        ids = model.answer(self.frames[0], self.subject.prompt, self.settings.new_tokens, self.watch)
        spans, memory = self._end(remember)
        return {name: Outcome(spans, model.visual_tokens, tuple(ids), memory=memory)}

    def _tower(self, name: str, tower: Tower, remember: bool) -> dict[str, Outcome]:
        self._begin(remember)
        videos, left = tower.encode(self.frames, self.watch)
        vision, memory = self._end(remember)
        seen = Outcome(vision, len(videos[0]), frames=left, memory=memory)
        if self.settings.vision_only:
            return {name: seen}
        tokens, made = videos[0], {}
        for inner in self.inner:
            self._begin(remember)
            ids = self._ask(tokens, inner)
            spans, memory = self._end(remember)
            most = max((x for x in (memory, seen.memory) if x is not None), default=None)
            row = name if inner is None else f"{name} + inner"
            made[row] = replace(
                seen, spans={**vision, **spans}, ids=tuple(ids), memory=most, inner=inner is not None
            )
        if name == self.asked_again and (again := self._ask_again(seen, tokens, remember)) is not None:
            made[f"{name}, second question"] = again
        return made

    def _ask(self, tokens: Tensor, inner: InnerMerging | None) -> list[int]:
        """What VideoPipeline does with a video's tokens, but that an answer may not end early."""
        language, length = self.subject.language, self.settings.new_tokens
        with marking(self.watch, (Seam(language.model, BEFORE, SPLICE), Seam(language, AFTER, PREFILL))):
            ids = generate(
                language, self.subject.prompt, tokens.to(language.device), inner=inner, max_new_tokens=length,
                min_new_tokens=length, streamer=FirstToken(self.watch),
            )
        self.watch.mark(GENERATION)
        new: list[int] = ids.tolist()
        return new

    def _ask_again(self, seen: Outcome, tokens: Tensor, remember: bool) -> Outcome | None:
        """The first token of another answer about a video whose keys and values are kept; None where they cannot be."""
        language = self.subject.language
        if has_windows(language.config):
            return None
        talk = Conversation(language)

        def first_token() -> Tensor:
            return talk.answer(self.subject.prompt, tokens, max_new_tokens=1)

        first_token()
        self._begin(remember)
        with marking(self.watch, (Seam(language.model, BEFORE, SPLICE), Seam(language, AFTER, PREFILL))):
            ids = first_token().tolist()
        self.watch.mark(FIRST_TOKEN)
        spans, memory = self._end(remember)
        return replace(seen, spans=spans, ids=tuple(ids), frames=(), memory=memory, second=True)

    def _begin(self, remember: bool) -> None:
        if remember or self.subject.device.type == "cuda":
            self._memory.start()
        self.watch.start()

    def _end(self, remember: bool) -> tuple[dict[str, float], int | None]:
        spans = self.watch.milliseconds()
        return spans, self._memory.growth() if remember or self.subject.device.type == "cuda" else None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says so; on a CPU its error has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _rows(
    name: str, made: list[dict[str, Outcome]], reading: list[Mapping[str, float]], course: Course
) -> list[Row]:
    subject, entrant = course.subject, course.entrants[name]
    rows = []
    for row, outcome in made[0].items():
        outcomes = [each[row] for each in made]
        spans = outcome.spans if outcome.second else {**reading[0], **outcome.spans}
        times = [o.spans if o.second else {**r, **o.spans} for r, o in zip(reading, outcomes, strict=True)]
        what = CONTESTANTS[name] + (f" ({entrant.what})" if isinstance(entrant, Tower) and entrant.what else "")
        if outcome.second:
            what = f"another question about a video whose keys and values are kept, those of {name}; no inner merging"
        config = None if outcome.second else _config(name, outcome, subject)
        rows.append(
            Row(
                row, name, what,
                spans=tuple(Span(span, tuple(round(each[span], 4) for each in times)) for span in spans),
                inner=outcome.inner, second_question=outcome.second, visual_tokens=outcome.visual_tokens,
                prompt_tokens=outcome.visual_tokens + max(0, len(subject.prompt) - 1), ids=outcome.ids,
                frames=outcome.frames, memory_bytes=course.memory.get(row),
                engine_bytes=entrant.engine_bytes if isinstance(entrant, Tower) else None,
                vision_flops=tower_flops(config, subject.geometry, subject.batch).total if config else None,
                prefill_flops=None if outcome.second else _prefill(outcome, subject),
            )
        )
    return rows


def _config(name: str, outcome: Outcome, subject: Subject) -> EarlyTomConfig | None:
    """The configuration whose FLOPs the tower took: static at the frames that were left; None where that is unknown."""
    if name in WHOLE:
        return unpruned_config(subject.config)
    left = outcome.frames
    if not left:
        return None if subject.config.merge_layers else subject.config
    try:
        return subject.config.replace(
            frame_budgets=left, retain=min(subject.config.retain, left[-1] / subject.config.frames)
        )
    except ConfigError:
        return None


def _prefill(outcome: Outcome, subject: Subject) -> int | None:
    if subject.language is None:
        return None
    text, inner = subject.language.config, subject.config.inner if outcome.inner else None
    return prefill_flops(
        outcome.visual_tokens, text.hidden_size, text.intermediate_size, text.num_hidden_layers,
        config=subject.config.replace(inner=inner),
    )
