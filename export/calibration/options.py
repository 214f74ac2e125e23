"""What a user asks of a calibration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from earlytom.calibration.budgets import DEFAULT_PERCENTILE

from ..settings import ExportOptions

# Of an export's options those that a calibration has too.
METHOD = ("checkpoint", "preset", "retain", "frames", "merge_layers", "frame_budgets", "tau", "max_window", "ema")
STAGES = ("count", "compare")


@dataclass(frozen=True)
class CalibrateOptions:
    """What to calibrate on, and how: the options of `earlytom-calibrate`.

    videos: files, directories, @lists, see find_videos; method: the checkpoint and how its frames are merged, of which
    `frame_budgets` (or the default ones) are compared beside the proposed; percentile, or target_flops where that is
    given: what chooses the budgets (up to 1: a share of the unpruned tower's FLOPs); compare: on how many clips budgets
    are run, None for all; journal: a file that results are kept in; workers: processes that read videos; strict: skip
    damaged videos and those with too few frames; device, threads: of the tower.
    """

    videos: tuple[str, ...]
    method: ExportOptions = field(default_factory=ExportOptions)
    percentile: float = DEFAULT_PERCENTILE
    target_flops: float | None = None
    compare: int | None = None
    journal: Path | None = None
    workers: int = 2
    strict: bool = False
    device: str | None = None
    threads: int | None = None
