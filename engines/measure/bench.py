"""Time the engines of one bundle against each other on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from earlytom.errors import EarlyTomError, EngineError
from earlytom.flops import tower_flops
from earlytom.video.clips import verification_clips

from ..bundle.reader import Bundle
from ..opening import open_runner
from ..products import ENGINES
from .machine import clocks, describe_machine
from .timing import compare_times

if TYPE_CHECKING:
    from earlytom.vision.siglip import Vision


def bench_bundle(
    bundle: Bundle, engines: Sequence[str] | None = None, *, runs: int = 30, device: str | None = None,
    vision: Vision | None = None,
) -> dict[str, Any]:
    """Run each engine on the same clip, round by round; plain JSON.

    {"times": engine -> median, minimum, maximum in ms, "speedup": how many times as fast as the first of them, round by
    round, "not_run": engine -> why, "why", "tflops", "machine", "clocks"}. engines: default all that the machine runs,
    the torch one where `vision` is given. A call includes moving a clip to the card where it is not there yet; here it
    is. Raises EngineError when none runs.
    """
    manifest = bundle.manifest
    if runs < 1:
        raise EngineError(f"runs is {runs}, it must be at least 1")
    frames = torch.from_numpy(
        verification_clips(
            None, frames=manifest.config.frames, size=manifest.geometry.image_size, batch=manifest.batch
        )
    )
    possible = tuple(n for n, e in ENGINES.items() if not e.needs_weights or vision is not None)
    names = possible if engines is None else tuple(engines)
    calls: dict[str, Callable[[], object]] = {}
    why, not_run, memory = {}, {}, {}
    with ExitStack() as stack:
        card: torch.device | None = None
        for name in names:
            try:
                runner = stack.enter_context(open_runner(bundle, name, device=device, vision=vision))
                clip = frames.to(runner.device)
                runner.run(clip)
            except EarlyTomError as error:
                not_run[name] = str(error)
                continue
            card = clip.device if clip.is_cuda else card
            calls[name], why[name] = partial(runner.run, clip), runner.why
            memory[name] = getattr(runner, "device_memory_bytes", None)
        if not calls:
            raise EngineError(f"no engine of {bundle.path} runs here: {'; '.join(not_run.values())}")
        if card is not None:
            stack.enter_context(torch.cuda.device(card))  # clocks and machine are those of the current one
        before = clocks()
        times = compare_times(calls, runs=runs, device=card or "cpu")
        first = next(iter(calls))
        done = tower_flops(manifest.config, manifest.geometry, manifest.batch).total
        return {
            "bundle": str(bundle.path), "dtype": manifest.dtype, "times": times.to_dict(),
            "speedup": {name: round(times.ratio(first, name), 3) for name in calls},
            "tflops": {name: round(done / times.timing(name).median / 1e9, 3) for name in calls},
            "device_memory_bytes": memory, "why": why, "not_run": not_run, "machine": describe_machine(),
            "clocks": {"before": before, "after": clocks()},
        }
