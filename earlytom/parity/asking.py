"""The language model's answers to two backends' visual tokens: asked alike, compared token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import InnerMerging
from ..errors import InputError
from ..language.prompt import build_prompt, embed_batch
from ..language.qwen2 import Qwen2, answer_length
from .answers import AnswerAgreement, Divergence

NEW_TOKENS = 32  # of an answer at most: a sentence or two
BATCH = 8  # questions at once


@torch.no_grad()
def compare_answers(
    language: Qwen2, tokenizer: Any, prompts: Sequence[Sequence[str]], reference: Sequence[Tensor],
    actual: Sequence[Tensor], *, limit: float, inner: InnerMerging | None = None, new_tokens: int = NEW_TOKENS,
    partings: Sequence[str] = (),
) -> AnswerAgreement:
    """Ask the same of both sides' visual tokens [N, L], greedily: prompts[i] is what is asked about video i.

    limit: error of a logit that is allowed, over the standard deviation of the reference's logits at the same place.
    inner: merging inside the LLM, as when a question is asked in earnest: each side decodes its own answer, so that no
    word of an answer is put into a prefill, which merges by what its last token looks at. partings: of each video, see
    Divergence; default: none parts. Raises InputError.
    """
    partings = partings or [""] * len(prompts)
    if not len(prompts) == len(reference) == len(actual) == len(partings) or not any(prompts):
        videos = f"{len(reference)} and {len(actual)} videos and {len(partings)} partings"
        raise InputError(f"{len(prompts)} lists of prompts do not go with {videos}")
    questions = equal = tokens = common = 0
    error, closest = 0.0, math.inf
    found: list[Divergence] = []
    for clip, (asked, mine, theirs, parting) in enumerate(zip(prompts, reference, actual, partings)):
        for first in range(0, len(asked), BATCH):
            some = asked[first : first + BATCH]
            ids = [build_prompt(tokenizer, question) for question in some]
            answers = [_greedy(language, ids, video, inner, new_tokens) for video in (mine, theirs)]
            for question, (a, a_logits), (b, b_logits) in zip(some, *answers):
                run = _common_run(a, a_logits, b, b_logits)
                seen = slice(min(run, len(a) - 1) + 1)
                largest = _largest((a_logits[seen].double() - b_logits[seen].double()).abs())
                best = a_logits[seen].double().topk(2, dim=-1).values
                questions, tokens, common = questions + 1, tokens + len(a), common + run
                if not parting:
                    error, closest = max(error, largest), min(closest, float((best[:, 0] - best[:, 1]).min()))
                if run == len(a):
                    equal += 1
                else:
                    texts = (tokenizer.decode(a[:run]), tokenizer.decode([a[run]]), tokenizer.decode([b[run]]))
                    numbers = _near(a_logits[run], b_logits[run], a[run], b[run], limit)
                    found.append(Divergence(question, clip, run, *texts, *numbers, parting))
    found.sort(key=lambda d: (d.explained, -d.margin))
    return AnswerAgreement(questions, equal, tokens, common, error, closest, tuple(found))


def _greedy(
    language: Qwen2, prompts: Sequence[Sequence[int]], video: Tensor, inner: InnerMerging | None, new_tokens: int
) -> list[tuple[list[int], Tensor]]:
    """For each prompt the ids of the answer, its end included, and the logits [ids, vocabulary] they were chosen by."""
    video = video.to(language.device, language.dtype)
    out = language.generate(
        **embed_batch(language, prompts, [video] * len(prompts)), inner=inner, max_new_tokens=new_tokens,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )
    found = []
    for k, ids in enumerate(out.sequences.tolist()):
        length = answer_length(language, ids)
        found.append((ids[:length], torch.stack([step[k] for step in out.logits[:length]]).float().cpu()))
    return found


def _common_run(a: Sequence[int], a_logits: Tensor, b: Sequence[int], b_logits: Tensor) -> int:
    """Tokens before the first that differs, or that was chosen by logits that are no numbers."""
    for i, (mine, theirs) in enumerate(zip(a, b)):
        if mine != theirs or not (a_logits[i].isfinite().all() and b_logits[i].isfinite().all()):
            return i
    return min(len(a), len(b))


def _near(a: Tensor, b: Tensor, mine: int, theirs: int, limit: float) -> tuple[float, float, float]:
    """Margin, error and allowed error of two tokens, chosen by logits a, b [vocabulary]; infinite if not finite."""
    a, b = a.double(), b.double()
    numbers = (float(a[mine] - a[theirs]), _largest((a - b).abs()), limit * float(a.std()))
    margin, error, allowed = (number if math.isfinite(number) else math.inf for number in numbers)
    return margin, error, allowed


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(nan=math.inf).max())
