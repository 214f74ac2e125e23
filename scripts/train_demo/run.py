"""Training, stage by stage: resumable, with a log; the same seed gives the same batches and the same first weights."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from earlytom.checkpoint.demo_tokenizer import make_tokenizer
from earlytom.checkpoint.keys import key_of
from earlytom.files import replacing

from .language import Packer
from .stages import STAGES, Stage
from .student import Student

EVERY = 50  # steps between lines of the log, and between saved states


def train(
    home: Path, *, seed: int = 0, only: Sequence[str] = (), smoke: bool = False, times: int = 1, workers: int = 0,
    device: str = "cpu",
) -> Path:
    """Run the stages (`only` those named) from where they were left; returns the weights written when all are done.

    home: holds a state for each stage, `log.jsonl` and, at the end, `weights.safetensors` with the tensors of a
    LLaVA-NeXT checkpoint. smoke: two tiny steps of each stage. times: as many times the clips in a step, where a
    device has room; workers: processes that draw ahead.
    """
    home.mkdir(parents=True, exist_ok=True)
    student, packer = Student(seed).to(device), Packer(make_tokenizer())
    with ProcessPoolExecutor(workers, get_context("spawn")) if workers else nullcontext() as pool:
        for stage in STAGES:
            stage = replace(stage, steps=2, size=1, warmup=1) if smoke else replace(stage, size=stage.size * times)
            saved = _load(home, stage, student)
            if (not only or stage.name in only) and (saved is None or saved["step"] < stage.steps):
                _run(home, stage, student, packer, saved, pool, 2 * workers)
    out = home / "weights.safetensors"
    with replacing(out) as unfinished:
        save_file({key_of(k, "llava-next"): v for k, v in student.weights().items()}, unfinished, {"format": "pt"})
    return out


class Optimizer:
    """AdamW, and Muon for the parameters of `matrices` that are trained, its steps scaled to be as large as AdamW's."""

    def __init__(self, parts: nn.Module, rate: float, matrices: Iterable[nn.Parameter]) -> None:
        trained, inner = list(parts.parameters()), {id(p) for p in matrices}
        rest, some = ([p for p in trained if (id(p) in inner) == which] for which in (False, True))
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
        ]
        if some:
            self.parts.append(torch.optim.Muon(some, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))

    def set_rate(self, rate: float) -> None:
        for group in (group for part in self.parts for group in part.param_groups):
            group["lr"] = rate

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def _run(
    home: Path, stage: Stage, student: Student, packer: Packer, saved: dict[str, Any] | None, pool: Executor | None,
    ahead: int,
) -> None:
    parts = nn.ModuleList(student.part(name) for name in stage.trains)
    student.requires_grad_(False)
    parts.requires_grad_(True)
    parameters = list(parts.parameters())
    optimizer = Optimizer(parts, stage.rate, student.matrices() if stage.muon else [])
    first, mean, spent = 0, {}, 0.0
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        first, mean, spent = saved["step"], saved["mean"], saved["seconds"]
    begun = time.perf_counter() - spent
    for step, drawn in _drawn(stage, first, pool, ahead):
        fallen = stage.least + (1 - stage.least) * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
        share = min(1.0, (step + 1) / stage.warmup) * fallen
        optimizer.set_rate(stage.rate * share)
        loss, values = stage.loss(student, packer, drawn)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, value in (values | {"loss": loss.item()}).items():
            mean[name] = value if name not in mean else 0.97 * mean[name] + 0.03 * value
        done = step + 1
        if done % EVERY == 0 or done == stage.steps:
            seconds = time.perf_counter() - begun
            row = {"stage": stage.name, "step": done, "size": stage.size, "seconds": round(seconds),
                   "rate": stage.rate * share}
            row |= {name: round(value, 4) for name, value in sorted(mean.items())}
            print(json.dumps(row), flush=True)
            state = {"step": done, "mean": mean, "seconds": seconds, "optimizer": optimizer.state_dict()}
            with replacing(_path(home, stage)) as unfinished:
                torch.save(state | {name: student.part(name).state_dict() for name in stage.trains}, unfinished)
            with (home / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
    student.requires_grad_(False)


def _drawn(stage: Stage, first: int, pool: Executor | None, ahead: int) -> Iterator[tuple[int, Any]]:
    """(step, what it is about), drawn here or some steps ahead in the pool: the same either way."""
    if pool is None:
        yield from ((step, stage.draw(step, stage.size)) for step in range(first, stage.steps))
        return
    waiting: deque[Future[Any]] = deque()
    for step in range(first, stage.steps):
        while len(waiting) <= ahead and step + len(waiting) < stage.steps:
            waiting.append(pool.submit(stage.draw, step + len(waiting), stage.size))
        yield step, waiting.popleft().result()


def _load(home: Path, stage: Stage, student: Student) -> dict[str, Any] | None:
    """The stage's last state, put into the student; None when it was never begun."""
    if not _path(home, stage).exists():
        return None
    saved: dict[str, Any] = torch.load(_path(home, stage), weights_only=True)
    for name in stage.trains:
        student.part(name).load_state_dict(saved.pop(name))
    return saved


def _path(home: Path, stage: Stage) -> Path:
    return home / f"{stage.name.replace(' ', '-')}.pt"
