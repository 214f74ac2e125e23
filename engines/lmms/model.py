"""lmms-eval's model `earlytom`, in the form of simple tasks and in that of chat messages.

The one module of ours that is built on lmms-eval's classes: it imports its package, and torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from earlytom.errors import ConfigError, EarlyTomError
from earlytom.video.files import check_file

from ..opening import torch_device
from .answering import Reply, answer, batches
from .arguments import read_arguments
from .opening import open_arguments
from .questions import VideoQuestion, chat_question, read_generation, simple_question

PROGRAM = "lmms-eval --model earlytom"
PADDING = "__padding_only__"  # lmms-eval gives each process as many requests; the answer to such a one is not read


class EarlyTom(lmms):
    """A bundle, or a checkpoint in PyTorch, that lmms-eval asks about videos; arguments: see ModelArguments.

    Of several processes (accelerate, torchrun) each has a pipeline of its own, on its own card where there are cards.
    Greedy answers are those of `VideoPipeline.ask`. Raises EarlyTomError; made from the command line's text, ends the
    program with its sentence instead, since lmms-eval would go on, and exit with status 0.
    """

    is_simple = True

    def __init__(self, **values: Any) -> None:
        super().__init__()
        arguments = read_arguments(values)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = _own_device(arguments.device)
        self.device = torch_device(device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # engines take the current card
        self.batch_size = arguments.batch_size
        self.pipeline = open_arguments(arguments, device)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> EarlyTom:
        """What lmms-eval makes the model with. Raises SystemExit with one sentence."""
        try:
            made: EarlyTom = super().create_from_arg_string(arg_string, additional_config)
        except EarlyTomError as error:
            raise SystemExit(f"{PROGRAM}: error: {error}") from None
        return made

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, each with its token counts; speed goes into lmms-eval's report.

        Ends the program with one sentence at a question that cannot be asked, such as of a video that cannot be read:
        an answer without it would count as any other. What is missing is told before the first question is asked.
        """
        asked = [at for at, request in enumerate(requests) if not (request.metadata or {}).get(PADDING)]
        results = [GenerationResult("") for _ in requests]
        try:
            questions = [self._question(requests[at]) for at in asked]
            for video in dict.fromkeys(question.video for question in questions):
                check_file(video)
            replies = self._replies(questions)
        except EarlyTomError as error:
            raise SystemExit(f"{PROGRAM}: error: {error}") from None
        for at, reply in zip(asked, replies, strict=True):
            results[at] = GenerationResult(reply.text, TokenCounts(reply.input_tokens, reply.output_tokens))
        return results

    def _replies(self, questions: Sequence[VideoQuestion]) -> list[Reply]:
        replies: list[Reply] = []
        with tqdm(total=len(questions), disable=self.rank != 0, desc="earlytom") as bar:
            for batch in batches(questions, self.batch_size):
                replies += answer(self.pipeline, batch)
                bar.update(len(batch))
        if replies:
            seconds, made = sum(r.seconds for r in replies), sum(r.output_tokens for r in replies)
            visual = sum(r.visual_tokens for r in replies) / len(replies)
            log_metrics(
                total_elapsed_time=seconds, total_gen_tokens=made, avg_speed=made / seconds,
                additional_metrics={"total_requests": len(replies), "visual_tokens": visual},
            )
        return replies

    def _question(self, request: Instance) -> VideoQuestion:
        context, generation, doc_to_visual, doc_id, task, split = request.args
        where = _where(task, doc_id)
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return simple_question(context, visuals, read_generation(generation or {}, where), where)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise _refusal(requests, "scores answers by their likelihood, earlytom generates them")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise _refusal(requests, "goes on for several rounds, earlytom answers one question at a time")

    def clean(self) -> None:
        """Free the pipeline when all is answered."""
        self.pipeline.close()
        super().clean()


class EarlyTomChat(EarlyTom):
    """The same for chat messages: what lmms-eval takes unless it is told `--force_simple`."""

    is_simple = False

    def _question(self, request: Instance) -> VideoQuestion:
        _, doc_to_messages, generation, doc_id, task, split = request.args
        where = _where(task, doc_id)
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).model_dump()["messages"]
        return chat_question(messages, read_generation(generation or {}, where), where)


def _refusal(requests: Sequence[Instance], why: str) -> SystemExit:
    task = requests[0].task_name if requests else "a task"
    return SystemExit(f"{PROGRAM}: error: {task} {why}: take a task of output_type generate_until")


def _where(task: str, doc_id: int) -> str:
    return f"document {doc_id} of {task}"


def _own_device(asked: str | None) -> str | None:
    """Of several processes on a machine each has the card of its number, unless one was named."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or int(os.environ.get("WORLD_SIZE", 1)) == 1 or asked not in (None, "cuda"):
        return asked
    if not torch.cuda.is_available():
        return asked
    if int(local) >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local} has no card of its own, of {torch.cuda.device_count()}: start as many processes as cards"
        )
    return f"cuda:{local}"
