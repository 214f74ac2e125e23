"""Who takes part, opened: a way from frames to visual tokens, or a whole model that is asked as one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from earlytom.adaptive import AdaptiveTower
from earlytom.config import EarlyTomConfig
from earlytom.errors import EarlyTomError, EngineError, first_line
from earlytom.tower import StaticTower, TowerOutputs, split_videos
from earlytom.vision.geometry import VisionGeometry, pooled_grid
from earlytom.vision.siglip import Vision

from ..opening import open_runner
from .onevision import OneVision, share_onevision
from .released import LAST, ReleasedTower
from .settings import ADAPTIVE, COMPILED, EAGER, RELEASED, SDPA, STATIC
from .stopwatch import Seam, Stopwatch, marking, tower_seams

if TYPE_CHECKING:
    from ..bundle.reader import Bundle

OPAQUE = "vision"  # the one span of a tower that cannot be looked into


@dataclass(frozen=True)
class Subject:
    """What all contestants share: weights, configuration, prompt, and where they run.

    vision, language: None where they were not loaded; batch: videos a call. device: of PyTorch's part; engine_device,
    threads: of engines, None for the best there is.
    """

    config: EarlyTomConfig
    geometry: VisionGeometry
    device: torch.device
    vision: Vision | None = None
    language: Any = None
    bundle: Bundle | None = None
    prompt: tuple[int, ...] = ()
    batch: int = 1
    engine_device: str | None = None
    threads: int | None = None

    def weights(self) -> Vision:
        if self.vision is None:
            raise EngineError("it computes from the weights, which were not given: --checkpoint")
        return self.vision


@dataclass(frozen=True)
class Tower:
    """A way from frames to visual tokens.

    run: frames uint8 [V, T, H, W, 3] on `device`, a mark -> visual tokens of each video, frames left after each merge
    layer (() where they are not known). what: on what it runs. seams: where its vision time is divided. engine_bytes:
    that it holds outside of PyTorch, by its own account.
    """

    device: torch.device
    run: Callable[[Tensor, Callable[[str], None]], tuple[list[Tensor], tuple[int, ...]]]
    what: str = ""
    seams: tuple[Seam, ...] = ()
    engine_bytes: int | None = None

    def encode(self, frames: Tensor, watch: Stopwatch) -> tuple[list[Tensor], tuple[int, ...]]:
        """Frames uint8 [V, T, H, W, 3] on a CPU; marks the copy and the stages of vision."""
        clip = frames.to(self.device)
        watch.mark("copy")
        with marking(watch, self.seams):
            return self.run(clip, watch.mark)


Entrant = Tower | OneVision


def open_contestant(name: str, subject: Subject, stack: ExitStack) -> Entrant:
    """Open a contestant, to be closed with `stack`. Raises EarlyTomError: in one sentence, why it cannot take part."""
    if name in (EAGER, SDPA):
        return share_onevision(
            subject.weights(), subject.language, subject.prompt, frames=subject.config.frames,
            attention="eager" if name == EAGER else "sdpa", merge_layers=subject.config.merge_layers,
        )
    if name in _OPENERS:
        return _OPENERS[name](subject)
    return _engine(name, subject, stack)


def _released(subject: Subject) -> Tower:
    vision = subject.weights()
    tower = ReleasedTower(vision, subject.config)

    def run(clips: Tensor, mark: Callable[[str], None]) -> tuple[list[Tensor], tuple[int, ...]]:
        found = [tower.encode(clip, mark) for clip in clips]
        return [tokens for tokens, _ in found], found[0][1]

    return Tower(vision.device, run)


def _adaptive(subject: Subject) -> Tower:
    vision = subject.weights()
    tower = AdaptiveTower(vision, subject.config)

    def run(clips: Tensor, mark: Callable[[str], None]) -> tuple[list[Tensor], tuple[int, ...]]:
        found = [tower.encode(clip).tokens for clip in clips]
        mark(LAST)
        return found, ()

    return Tower(vision.device, run, seams=_seams(subject))


def _static(subject: Subject) -> Tower:
    vision = subject.weights()
    tower = StaticTower(vision, subject.config, batch=subject.batch)
    return Tower(vision.device, _fixed(tower, subject, LAST), seams=_seams(subject))


def _compiled(subject: Subject) -> Tower:
    """Compiled here, by a first call: what is measured is what comes after."""
    vision = subject.weights()
    static = StaticTower(vision, subject.config, batch=subject.batch)
    shape = static.shapes.inputs["frames"][1]
    tower: Callable[[Tensor], TowerOutputs] = torch.compile(static)
    try:
        with torch.inference_mode():
            tower(torch.zeros(shape, dtype=torch.uint8, device=vision.device))
    except EarlyTomError:
        raise
    except Exception as error:  # a compiler that is not there, or fails, in whatever way
        raise EngineError(f"torch.compile does not work here: {first_line(error)}") from None
    return Tower(vision.device, _fixed(tower, subject, OPAQUE))


def _engine(name: str, subject: Subject, stack: ExitStack) -> Tower:
    if subject.bundle is None:
        raise EngineError(f"{name} is an engine of a bundle, and there is none")
    runner = stack.enter_context(
        open_runner(subject.bundle, name, device=subject.engine_device, threads=subject.threads)
    )
    return Tower(
        runner.device, _fixed(runner.run, subject, OPAQUE), what=runner.why,
        engine_bytes=getattr(runner, "device_memory_bytes", None),
    )


_OPENERS: dict[str, Callable[[Subject], Tower]] = {
    RELEASED: _released, ADAPTIVE: _adaptive, STATIC: _static, COMPILED: _compiled,
}


def _seams(subject: Subject) -> tuple[Seam, ...]:
    return tower_seams(list(subject.weights().layers), subject.config.merge_layers)


def _fixed(
    tower: Callable[[Tensor], TowerOutputs], subject: Subject, last: str
) -> Callable[[Tensor, Callable[[str], None]], tuple[list[Tensor], tuple[int, ...]]]:
    """`Tower.run` of what has static shapes; the cut of the padding is part of it."""
    grid = pooled_grid(subject.geometry.grid, subject.config.pooling)

    def run(clips: Tensor, mark: Callable[[str], None]) -> tuple[list[Tensor], tuple[int, ...]]:
        videos = split_videos(tower(clips), subject.config, grid)
        mark(last)
        return [video.tokens for video in videos], subject.config.frame_budgets

    return run
