"""Stages 2 and 3: the language model learns to answer, all questions about a clip in one packed sequence.

The video's tokens stand once, each question follows as if it were the only one: it sees the video and itself, and its
positions begin right after the video. Only full tokens are ever seen, no frame merged, no patch left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from earlytom.demo.draw import draw
from earlytom.demo.questions import KINDS, PLACES, Question, questions_of, side_of
from earlytom.demo.world import SIZE, Clip, make_clip
from earlytom.language.prompt import VIDEO_TOKEN, build_prompt

from .tower import PATCH, label, window_of

IGNORED = -100


@dataclass(frozen=True)
class Lesson:
    """A clip, its window (corner and side in patches of `patch` pixels), and what is asked about it."""

    clip: Clip
    corner: tuple[int, int]
    side: int
    patch: int
    questions: tuple[Question, ...]

    @property
    def window(self) -> tuple[int, int, int, int]:
        row, column = self.corner
        left, top = column * self.patch, row * self.patch
        return left, top, left + self.side * self.patch, top + self.side * self.patch

    def pixels(self) -> Tensor:
        """uint8 [T, H, W, 3]"""
        return torch.from_numpy(draw(self.clip, window=self.window))

    def labels(self) -> Tensor:
        """What a perfect tower would say of each patch, float32 [T, S, DESCRIPTION]."""
        return torch.from_numpy(np.stack([
            describe(label(self.clip, t, self.corner, self.side, self.patch), self.corner, self.side, self.patch)
            for t in range(self.clip.frames)
        ]))


BINS = 8  # of a thing's place, each way: an even number, so that the middle of the frame is between two
DESCRIPTION = 8 + 8 + 2 + 2 + 5 + 5 + 2 + 2 + 2 * BINS + len(PLACES)


def describe(labels: tuple[Any, ...], corner: Sequence[int], side: int, patch: int = PATCH) -> Any:
    """Labels of a window, as tower.label's first four -> what a perfect tower would say, float32 [S, DESCRIPTION]."""
    thing, offset, counts, near, *_ = labels
    places = np.stack(np.meshgrid(np.arange(side) + corner[1], np.arange(side) + corner[0]), -1)
    at = (places.reshape(-1, 2) + 0.5) * (patch * 2 / SIZE) - 1
    number = [np.broadcast_to(np.eye(5)[n], (len(thing), 5)) for n in counts]
    # Few patches show a thing: what they show is said louder than what all say alike.
    shown = [3.0 * np.eye(n)[thing[:, i]][:, 1:] for i, n in enumerate((9, 9, 3))]
    # Where the thing's centre is, in words: of numbers, a look that blurs two things would give what is between them.
    # Its side loudest: what is asked of it hangs on which thing is meant.
    centre = (places.reshape(-1, 2) + 0.5) * patch + offset * PATCH
    which = np.clip(centre * (BINS / SIZE), 0, BINS - 1).astype(int)
    words = [2.0 * np.eye(BINS)[which[:, i]] * (thing[:, :1] > 0) for i in (0, 1)]
    sides = [PLACES.index(side_of(*point)) for point in centre]
    words.append(5.0 * np.eye(len(PLACES))[sides] * (thing[:, :1] > 0))
    parts = [*shown, offset, *(0.5 * x for x in number), near / 14, at, *words]
    return np.concatenate(parts, 1).astype(np.float32)


# Kinds that few clips have are asked more often where they can be; first what hangs on which thing is meant, which a
# model learns last by itself; later those that are not learned yet.
EVEN = {kind: 1.0 if kind in ("colour", "shape") else 2.0 for kind in (*KINDS, "describe")}
FIRST = EVEN | {"colour": 4.0, "shape": 4.0, "count": 0.5}
THEN = EVEN | {"colour": 3.0, "where": 3.0, "motion": 3.0, "brief": 4.0, "change": 3.0, "count": 0.5}
LAST = EVEN | {"where": 3.0, "motion": 3.0, "brief": 4.0, "change": 1.5, "describe": 0.7}
WHERE = EVEN | {"where": 5.0, "motion": 5.0, "brief": 5.0, "count": 0.7, "describe": 0.5}
WHOLE = EVEN | {"motion": 4.0, "brief": 5.0, "count": 3.0, "order": 3.0, "change": 3.0}  # what length makes harder
# Options give colours away: who looks up each option's shape needs not find a thing by its shape. So ask without.
OPEN = dict.fromkeys(KINDS, 0.4) | {"colour": 0.75, "change": 0.75}


def make_lessons(
    seed: int, step: int, size: int, frames: int, side: int, asked: int, patch: int = PATCH, most: int = 4,
    weights: Mapping[str, float] = LAST, opened: Mapping[str, float] = OPEN,
) -> list[Lesson]:
    """Batch `step`: clips of as many frames, `asked` questions about each.

    most: things in a clip; weights: of the kinds of questions that a clip has, in the draw of each question; opened:
    how often a kind is asked without options.
    """
    rng = Random(f"language {seed} {step}")
    lessons = []
    for i in range(size):
        whole = side * patch + patch > SIZE
        corner, field = ((0, 0), (0, 0, SIZE, SIZE)) if whole else window_of(rng, side)
        numbers = count((step * 1000 + i) * (100 if most < 4 else 1))
        clips = (make_clip("train", seed + 1, number, frames=frames, field=field) for number in numbers)
        clip = next(clip for clip in clips if len(clip.things) <= most)
        found = questions_of(clip, seed)
        kinds = sorted({question.kind for question in found})
        chosen = []
        for kind in rng.choices(kinds, [weights[kind] for kind in kinds], k=asked):
            question = rng.choice([q for q in found if q.kind == kind])
            chosen.append(question.opened() if rng.random() < opened.get(kind, 0) else question)
        lessons.append(Lesson(clip, corner, side, patch, tuple(chosen)))
    return lessons


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of a packed sequence, as transformers calls it: causal up to the end of the video, where all questions
    see the same, and by attention_mask [B, 1, Q, N] for the Q columns after it. q, k, v [B, heads, N, D]."""
    groups, head = query.shape[1] // key.shape[1], query.shape[2] - attention_mask.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    video = F.scaled_dot_product_attention(
        query[:, :, :head], key[:, :, :head], value[:, :, :head], is_causal=True, scale=scaling
    )
    asked = F.scaled_dot_product_attention(query[:, :, head:], key, value, attn_mask=attention_mask, scale=scaling)
    return torch.cat([video, asked], 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


class Packer:
    """Prompts and answers as ids, by the checkpoint's own tokenizer and prompt."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
        prompt = build_prompt(tokenizer, "?")
        self.before = prompt[: prompt.index(VIDEO_TOKEN)]
        self.segment = lru_cache(maxsize=100_000)(self._segment)

    def _segment(self, question: Question) -> tuple[list[int], int]:
        """Ids after the video, the answer and its end included; and where the answer begins."""
        prompt = build_prompt(self.tokenizer, question.prompt)
        after = prompt[prompt.index(VIDEO_TOKEN) + 1 :]
        answer = self.tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        return [*after, *answer, self.eos], len(after)

    def pack(self, lessons: Sequence[Lesson], visual: int, stretch: int = 1) -> tuple[Tensor, ...]:
        """For videos of `visual` tokens, `stretch` positions each: ids [B, N] (0 where the video stands), positions
        [B, N], labels [B, N] and which question a column belongs to [B, N]: 0 the video and what is before it, -1
        padding."""
        start, head = len(self.before), len(self.before) + visual
        end = start + visual * stretch
        rows = []
        for lesson in lessons:
            ids, places = [*self.before, *[0] * visual], [*range(start), *range(start, end, stretch)]
            labels, owner = [IGNORED] * head, [0] * head
            for number, question in enumerate(lesson.questions, 1):
                segment, at = self.segment(question)
                ids += segment
                places += range(end, end + len(segment))
                labels += [IGNORED] * at + segment[at:]
                owner += [number] * len(segment)
            rows.append((ids, places, labels, owner))
        longest = max(len(row[0]) for row in rows)
        padded = [[[*x, *[fill] * (longest - len(x))] for x, fill in zip(row, (0, 0, IGNORED, -1))] for row in rows]
        return tuple(torch.tensor([row[i] for row in padded]) for i in range(4))


def answer_loss(
    language: Qwen2ForCausalLM, packer: Packer, lessons: Sequence[Lesson], visual: Tensor, stretch: int = 1
) -> tuple[Tensor, dict[str, float]]:
    """visual [B, V, L], the newline included -> mean loss of the answers' tokens, and by kind the share of answers
    whose every token is the likeliest."""
    ids, places, labels, owner = (x.to(visual.device) for x in packer.pack(lessons, visual.shape[1], stretch))
    embeds = language.get_input_embeddings()(ids)
    start = len(packer.before)
    embeds = torch.cat([embeds[:, :start], visual, embeds[:, start + visual.shape[1] :]], 1)
    n, head = ids.shape[1], start + visual.shape[1]
    sees = torch.ones(n, n, dtype=torch.bool, device=visual.device).tril()[head:][None] & (
        (owner[:, head:, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    )  # [B, N - head, N]
    out = language.model(
        inputs_embeds=embeds, attention_mask={"full_attention": sees[:, None]}, position_ids=places, use_cache=False
    ).last_hidden_state
    target = labels[:, 1:]
    at = target != IGNORED
    logits = language.lm_head(out[:, :-1][at])
    loss = F.cross_entropy(logits, target[at])
    right = torch.ones_like(labels[:, 1:], dtype=torch.bool)
    right[at] = logits.argmax(-1) == target[at]
    log: dict[str, list[float]] = {}
    for row, lesson in enumerate(lessons):
        for number, question in enumerate(lesson.questions, 1):
            mine = owner[row, 1:] == number
            log.setdefault(question.kind, []).append(float(right[row][mine].all()))
    return loss, {kind: sum(found) / len(found) for kind, found in log.items()}

