"""The last hop of the ladder: what the bundle's own language model answers from both sides' visual tokens.

It runs in PyTorch and float32, greedily and with the bundle's inner merging, so that all that differs is the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earlytom.checkpoint import Model, load
from earlytom.demo.draw import draw
from earlytom.demo.questions import questions_of
from earlytom.demo.world import make_clip
from earlytom.errors import CheckpointError, EarlyTomError
from earlytom.parity import HopReport, compare_answers, judge_answers, logits_limit
from earlytom.tower import TowerOutputs, split_videos
from engines.bundle.reader import Bundle
from engines.opening import torch_device

from ..settings import Questions

SEED = 0  # of the drawn clips
Asked = tuple[Tensor, tuple[str, ...]]  # a clip uint8 [T, H, W, 3] and the questions about it


class Interview:
    """Puts the same questions to both sides of a hop.

    A side's visual tokens are those of the verified clip (of a batch its first video), then those of each drawn one.
    checkpoint: see `verify_bundle`. The language model is read when it is first asked, on a GPU where there is one.
    """

    def __init__(self, bundle: Bundle, questions: Questions, checkpoint: str | Path | None = None) -> None:
        self.manifest, self.check, self.checkpoint = bundle.manifest, bundle.check_weights, checkpoint
        self.drawn = list(drawn_clips(questions.drawn, self.manifest.config.frames))
        self.prompts = [questions.prompts, *(prompts for _, prompts in self.drawn)]
        self._model: Model | None = None

    def tokens(self, outputs: TowerOutputs, run: Callable[[Tensor], TowerOutputs]) -> list[Tensor]:
        """Visual tokens [N, L] of each clip. outputs: of the verified one; run: what made them, for the drawn ones.

        A batch takes as many drawn clips a call as it has videos, the last of them again where there are not enough.
        """
        found, size = self._split(outputs)[:1], self.manifest.batch
        clips = [clip for clip, _ in self.drawn]
        for first in range(0, len(clips), size):
            some = clips[first : first + size]
            frames = torch.stack(some + some[-1:] * (size - len(some))).to(outputs.tokens.device)
            with torch.no_grad():
                found += self._split(run(frames))[: len(some)]
        return found

    def _split(self, outputs: TowerOutputs) -> list[Tensor]:
        side = self.manifest.shapes.pooled_grid
        return [video.tokens.float().cpu() for video in split_videos(outputs, self.manifest.config, side)]

    def report(self, hop: HopReport, reference: Sequence[Tensor], actual: Sequence[Tensor]) -> HopReport:
        """`hop` with the answers, failed where they differ by more than near-ties, or why there are none."""
        config = self.manifest.config
        try:
            model = self._load()
            answers = compare_answers(
                model.language, model.tokenizer, self.prompts[: len(reference)], reference, actual, inner=config.inner,
                limit=logits_limit(hop.dtype, config.inner),
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


def drawn_clips(questions: int, frames: int) -> Iterator[Asked]:
    """Clips of the small world's test split, at its size of 384 x 384, until that many questions are asked."""
    index = 0
    while questions > 0:
        clip = make_clip("test", SEED, index, frames=frames)
        prompts = tuple(question.prompt for question in questions_of(clip))[:questions]
        if prompts:
            yield torch.from_numpy(draw(clip)), prompts
        questions, index = questions - len(prompts), index + 1
