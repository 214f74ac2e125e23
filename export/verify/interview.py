"""The last hop of the ladder: what the bundle's own language model answers from both sides' visual tokens.

It runs in PyTorch and float32, greedily and with the bundle's inner merging, so that all that differs is the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlytom.checkpoint import Model, load
from earlytom.demo.draw import draw
from earlytom.demo.questions import questions_of
from earlytom.demo.world import make_clip
from earlytom.errors import CheckpointError, EarlyTomError
from earlytom.parity import (
    HopReport,
    ScoreErrors,
    VideoTrace,
    agree,
    align,
    compare_answers,
    judge,
    judge_answers,
    logits_limit,
    measure,
    parting,
    sources,
    split_trace,
)
from earlytom.tower import TowerTrace, split_videos
from engines.bundle.reader import Bundle
from engines.opening import torch_device

from ..settings import Questions

SEED = 0  # of the drawn clips
Asked = tuple[Tensor, tuple[str, ...]]  # a clip uint8 [T, H, W, 3] and the questions about it


class Seen(NamedTuple):
    """What one backend made of one clip: the visual tokens [N, L] that it is asked about, and what it chose."""

    tokens: Tensor
    video: VideoTrace


class Interview:
    """Puts the same questions to both sides of a hop.

    What a side has seen is the verified clip (of a batch its first video), then each drawn one. checkpoint: see
    `verify_bundle`. The language model is read when it is first asked, on a GPU where there is one.
    """

    def __init__(self, bundle: Bundle, questions: Questions, checkpoint: str | Path | None = None) -> None:
        self.manifest, self.check, self.checkpoint = bundle.manifest, bundle.check_weights, checkpoint
        self.drawn = list(drawn_clips(questions.drawn, self.manifest.config.frames))
        self.prompts = [questions.prompts, *(prompts for _, prompts in self.drawn)]
        self._model: Model | None = None

    def look(self, trace: TowerTrace, run: Callable[[Tensor], TowerTrace]) -> list[Seen]:
        """What a backend makes of each clip. trace: of the verified one; run: what made it, for the drawn ones.

        A batch takes as many drawn clips a call as it has videos, the last of them again where there are not enough.
        """
        found, size = self._split(trace)[:1], self.manifest.batch
        clips = [clip for clip, _ in self.drawn]
        for first in range(0, len(clips), size):
            some = clips[first : first + size]
            frames = torch.stack(some + some[-1:] * (size - len(some))).to(trace.outputs.tokens.device)
            with torch.no_grad():
                found += self._split(run(frames))[: len(some)]
        return found

    def _split(self, trace: TowerTrace) -> list[Seen]:
        config, shapes = self.manifest.config, self.manifest.shapes
        # Hidden states are not compared here, and are the bulk of a trace.
        stages = tuple(stage._replace(hidden=stage.hidden[..., :0].clone()) for stage in trace.stages)
        trace = trace._replace(stages=stages)
        tokens = [video.tokens.float().cpu() for video in split_videos(trace.outputs, config, shapes.pooled_grid)]
        return [Seen(*one) for one in zip(tokens, split_trace(trace, config, shapes))]

    def compare(
        self, hop: HopReport, shown: Sequence[Seen], reference: Sequence[Seen], actual: Sequence[Seen],
        errors: ScoreErrors | None,
    ) -> HopReport:
        """`hop`, also failed where the drawn clips do not hold its tolerances, and with the answers.

        shown: what the static tower has seen, with its scores. They say how close a choice was, and both sides of any
        hop are held against them; of a clip whose plan parts from the static tower's at a tie, its tokens are not.
        errors: see `agree`.
        """
        config, shapes = self.manifest.config, self.manifest.shapes

        def part(a: Seen, b: Seen) -> str:
            if _same_plan(a, b):
                return ""
            return parting(agree(a.video, b.video, config, shapes, errors=errors).plan, hop.dtype)

        mine, theirs = (list(map(part, shown, side)) for side in (reference, actual))
        held = [k for k in range(1, len(actual)) if not theirs[k]]
        if held:
            wanted, given = ([side[k].video for k in held] for side in (shown, actual))
            aligned = align(wanted, given, config, shapes, errors=errors)
            found = measure(aligned, (hop.reference, hop.actual), hop.dtype)
            reasons = [f"drawn clips, against the static tower: {reason}" for reason in judge(found).reasons]
            hop = replace(hop, reasons=(*hop.reasons, *reasons), status="failed" if reasons else hop.status)
        partings = [
            "" if _same_plan(a, b) else at or to for a, b, at, to in zip(reference, actual, mine, theirs)
        ]
        return self.report(hop, [one.tokens for one in reference], [one.tokens for one in actual], partings)

    def report(
        self, hop: HopReport, reference: Sequence[Tensor], actual: Sequence[Tensor], partings: Sequence[str] = ()
    ) -> HopReport:
        """`hop` with the answers, failed where they differ by more than near-ties, or why there are none."""
        config = self.manifest.config
        try:
            model = self._load()
            answers = compare_answers(
                model.language, model.tokenizer, self.prompts[: len(reference)], reference, actual, inner=config.inner,
                limit=logits_limit(hop.dtype, config.inner), partings=partings,
            )
        except (EarlyTomError, torch.OutOfMemoryError) as error:
            return replace(hop, unasked=f"the language model could not be asked: {str(error).splitlines()[0]}")
        reasons = (*hop.reasons, *judge_answers(answers))
        return replace(hop, answers=answers.worst(), reasons=reasons, status="failed" if reasons else hop.status)

    def _load(self) -> Any:
        if self._model is None:
            name = self.checkpoint or self.manifest.checkpoint["name"]
            pooling = self.manifest.config.pooling
            model = load(name, parts=("language",), pooling=pooling, check=self.check, device=torch_device(None))
            if model.tokenizer is None:
                raise CheckpointError(f"the checkpoint {name} has no tokenizer")
            self._model = model
        return self._model


def _same_plan(a: Seen, b: Seen) -> bool:
    """Whether the same frames are left, with the same marks."""
    mine, theirs = a.video, b.video
    return sources(mine.weights) == sources(theirs.weights) and torch.equal(mine.dynamic, theirs.dynamic)


def drawn_clips(questions: int, frames: int) -> Iterator[Asked]:
    """Clips of the small world's test split, at its size of 384 x 384, until that many questions are asked."""
    index = 0
    while questions > 0:
        clip = make_clip("test", SEED, index, frames=frames)
        prompts = tuple(question.prompt for question in questions_of(clip))[:questions]
        if prompts:
            yield torch.from_numpy(draw(clip)), prompts
        questions, index = questions - len(prompts), index + 1
