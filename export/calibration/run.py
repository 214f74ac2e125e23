"""Counting and comparing: every clip through the tower up to its last merge layer, what is known already left out.

A first pass counts what the released rules leave and runs the default budgets beside them; the budgets proposed are
known only then, so a second pass runs those. In each, forms of merging share the layers up to the first merge layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from earlytom import __version__
from earlytom.calibration.agreement import Agreement, difference, summarise
from earlytom.calibration.merging import Form, merge_clip
from earlytom.calibration.result import (
    Calibration,
    Choice,
    Counted,
    Skipped,
    check_target,
    flops_of,
    propose,
    unpruned_flops,
)
from earlytom.checkpoint import CheckpointIdentity, load
from earlytom.config import EarlyTomConfig
from earlytom.errors import ConfigError, VideoError
from earlytom.shapes import derive_shapes
from earlytom.video.ahead import read_ahead
from earlytom.video.files import content_identity, find_videos
from earlytom.vision.siglip import Vision
from engines.opening import torch_device

from ..progress import Progress
from ..settings import is_preset_file, resolve
from .options import STAGES, CalibrateOptions
from .results import Entry, Results

SAY_EVERY = 10.0  # seconds, where progress is a log


@dataclass(frozen=True)
class _Clip:
    path: Path
    identity: str


def calibrate(options: CalibrateOptions, progress: Progress | None = None) -> Calibration:
    """Frame budgets for `options.method` on `options.videos`: what `earlytom-calibrate` does.

    A video that cannot be read is left out and told, in `Calibration.skipped` too. Raises EarlyTomError: VideoError
    when none can be read, ConfigError, CheckpointError.
    """
    progress = progress or Progress(STAGES, quiet=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch_device(options.device)
    method = options.method
    videos = find_videos(options.videos)
    identity = load(method.checkpoint, device="meta", parts=("vision",)).identity
    config = resolve(method, identity)
    if not config.merge_layers:
        raise ConfigError("there are no merge layers, so there is nothing to calibrate: give some")
    derive_shapes(config, identity.geometry)
    full = unpruned_flops(config, identity.geometry)
    target = options.target_flops
    if target is not None:
        target = target * full if target <= 1 else target
        check_target(config, identity.geometry, target)
    results = Results(options.journal, _key(options, config, identity, device))
    work = _Work(options, config, identity, device, results, progress)
    clips = work.identify(videos)

    compared = clips if options.compare is None else clips[: options.compare]
    work.run("count", clips, {None: clips, config.frame_budgets: compared})
    counted = tuple(
        Counted(str(clip.path), clip.identity, found.counts)
        for clip in clips if (found := results.get(clip.identity, None)) is not None
    )
    if not counted:
        raise VideoError(f"not one of {len(videos)} videos can be read, of which the first says: "
                         f"{work.skipped[0].reason}")
    counts = [clip.counts for clip in counted]
    proposal = propose(counts, config, identity.geometry, percent=options.percentile, target_flops=target)
    work.run("compare", compared, {proposal.budgets: compared})

    released = sum(flops_of(clip, config, identity.geometry) for clip in counts) / len(counts)
    own = "given" if method.frame_budgets is not None or is_preset_file(method.preset) else "default"
    choices = [Choice("released rules", None, released)] + [
        Choice(name, budgets, flops_of(budgets, config, identity.geometry), _agreement(results, compared, budgets))
        for name, budgets in ((own, config.frame_budgets), ("proposed", proposal.budgets))
    ]
    return Calibration(
        identity.name, identity.digest, identity.geometry, config, counted, tuple(work.skipped), proposal, target, full,
        tuple(choices),
    )


def _key(options: CalibrateOptions, config: EarlyTomConfig, identity: CheckpointIdentity, device: torch.device) -> str:
    """What frame counts depend on beside the clip, in words. Budgets are not of it, nor what chooses them."""
    layers = ",".join(map(str, config.merge_layers))
    return (
        f"{config.frames} frames{', strictly' if options.strict else ''}, tau {config.tau!r}, M {config.max_window}, "
        f"ema {config.ema!r}, merge layers {layers}, weights {identity.digest}, on {device.type}, "
        f"earlytom-export {__version__}"
    )


def _agreement(results: Results, clips: Sequence[_Clip], budgets: tuple[int, ...]) -> Agreement | None:
    found = []
    for clip in clips:
        fixed, released = results.get(clip.identity, budgets), results.get(clip.identity, None)
        if fixed is not None and released is not None:
            found.append(difference(fixed, released))
    return summarise(found) if found else None


class _Work:
    """The passes over the clips. skipped: videos that could not be read; the weights are read when they are needed."""

    def __init__(
        self, options: CalibrateOptions, config: EarlyTomConfig, identity: CheckpointIdentity, device: torch.device,
        results: Results, progress: Progress,
    ) -> None:
        self.options, self.config, self.identity, self.device = options, config, identity, device
        self.results, self.progress = results, progress
        self.skipped: list[Skipped] = []
        self._vision: Vision | None = None

    def identify(self, videos: Sequence[Path]) -> list[_Clip]:
        clips = []
        for path in videos:
            try:
                clips.append(_Clip(path, content_identity(path)))
            except VideoError as error:
                self._skip(path, error)
        return clips

    def run(self, stage: str, clips: Sequence[_Clip], forms: dict[Form, Sequence[_Clip]]) -> None:
        """Have the results of each form on its clips, in the order of `clips`; the same content once."""
        wanted: dict[str, list[Form]] = {}
        for form, those in forms.items():
            for clip in those:
                todo = wanted.setdefault(clip.identity, [])
                if form not in todo and self.results.get(clip.identity, form) is None:
                    todo.append(form)
        unread = {skipped.file for skipped in self.skipped}
        first = {c.identity: c for c in reversed(clips) if wanted.get(c.identity) and str(c.path) not in unread}
        pending = [clip for clip in clips if first.get(clip.identity) is clip]
        with self.progress.stage(stage):
            reading = read_ahead(
                [clip.path for clip in pending], frames=self.config.frames, size=self.identity.geometry.image_size,
                strict=self.options.strict, workers=min(self.options.workers, len(pending)),
            )
            with closing(reading):
                meter = _Meter(self.progress, len(pending))
                for clip, read in zip(pending, reading):
                    if isinstance(read, VideoError):
                        for same in clips:
                            if same.identity == clip.identity:
                                self._skip(same.path, read)
                    else:
                        if stage == STAGES[0]:
                            for note in read.notes:
                                self.progress.say(note)
                        self._merge(clip, torch.from_numpy(read.frames), wanted[clip.identity])
                    meter.tick(clip.path.name)

    def _merge(self, clip: _Clip, frames: torch.Tensor, forms: Sequence[Form]) -> None:
        if self._vision is None:
            self._vision = load(self.options.method.checkpoint, device=self.device, parts=("vision",)).vision
            assert self._vision is not None  # it was asked for
        merged = merge_clip(self._vision, self.config, frames, forms)
        self.results.add([Entry(clip.identity, form, found) for form, found in zip(forms, merged)])

    def _skip(self, path: Path, error: VideoError) -> None:
        self.skipped.append(Skipped(str(path), str(error)))
        self.progress.say(f"skipped: {error}")


class _Meter:
    """How far it is and how long it will take: on a terminal at each clip, in a log now and then."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        self.start = self.said = time.monotonic()

    def tick(self, name: str) -> None:
        self.done += 1
        now = time.monotonic()
        left = (now - self.start) / self.done * (self.total - self.done)
        text = f"clip {self.done} of {self.total}, about {left:.0f} s left"
        if self.progress.live:
            self.progress.step(f"{text}; {name}")
        elif now - self.said >= SAY_EVERY:
            self.said = now
            self.progress.say(text)
