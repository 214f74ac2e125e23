"""What a calibration found: counts of every clip, the budgets they come to, and what each choice costs and keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..config import EarlyTomConfig, least_frames
from ..flops import tower_flops, unpruned_config
from ..vision.geometry import VisionGeometry
from .agreement import Agreement
from .budgets import Counts, Proposal, budgets_within, check_reachable, percentile, percentile_budgets
from .preset_file import CalibratedPreset, Origin

SHOWN = (0, 10, 25, 50, 75, 90, 100)  # percentiles


@dataclass(frozen=True)
class Counted:
    """A clip that was counted: its file, the identity of its content, the frames left after each merge layer."""

    file: str
    identity: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Skipped:
    file: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """Budgets, or the released rules (budgets None): FLOPs of the tower for one clip, and how far from the released
    plan they are, None where that was not looked into."""

    name: str
    budgets: tuple[int, ...] | None
    flops: float
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Calibration:
    """checkpoint: its name; full: FLOPs of the unpruned tower for one clip; choices: the released rules first."""

    checkpoint: str
    digest: str
    geometry: VisionGeometry
    config: EarlyTomConfig
    clips: tuple[Counted, ...]
    skipped: tuple[Skipped, ...]
    proposal: Proposal
    target_flops: float | None
    full: int
    choices: tuple[Choice, ...]

    def histogram(self, stage: int) -> dict[int, int]:
        """Frames left after merge layer number `stage` -> clips, rising."""
        return dict(sorted(Counter(clip.counts[stage] for clip in self.clips).items()))

    def percentiles(self, stage: int) -> dict[int, float]:
        """Percentile -> frames left after merge layer number `stage`, of SHOWN."""
        values = [clip.counts[stage] for clip in self.clips]
        return {percent: float(percentile(values, percent)) for percent in SHOWN}

    def preset(self, name: str) -> CalibratedPreset:
        config = self.config
        origin = Origin(
            self.checkpoint, self.digest, self.geometry.layers, len(self.clips), self.proposal.percentile,
            self.target_flops,
        )
        return CalibratedPreset(
            name, config.retain, config.frames, config.merge_layers, self.proposal.budgets, config.tau,
            config.max_window, config.ema, origin,
        )

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        layers = [
            {
                "layer": layer, "histogram": {str(count): n for count, n in self.histogram(stage).items()},
                "percentiles": {str(percent): value for percent, value in self.percentiles(stage).items()},
            }
            for stage, layer in enumerate(self.config.merge_layers)
        ]
        return {
            "checkpoint": {"name": self.checkpoint, "digest": self.digest, "layers": self.geometry.layers},
            "config": self.config.to_dict(), "layers": layers, "unpruned_flops": self.full,
            "proposal": asdict(self.proposal), "target_flops": self.target_flops,
            "choices": [asdict(choice) for choice in self.choices],
            "clips": [asdict(clip) for clip in self.clips], "skipped": [asdict(skipped) for skipped in self.skipped],
        }


def propose(
    counts: Counts, config: EarlyTomConfig, geometry: VisionGeometry, *, percent: float, target_flops: float | None
) -> Proposal:
    """Budgets of a percentile or, with `target_flops`, the largest whose tower stays within it. Raises ConfigError."""
    if target_flops is None:
        return Proposal(percentile_budgets(counts, percent, config), percent)
    return budgets_within(counts, config, lambda budgets: flops_of(budgets, config, geometry), target_flops)


def check_target(config: EarlyTomConfig, geometry: VisionGeometry, target_flops: float) -> None:
    """Raise ConfigError when no budgets cost as little, whatever the clips: asked before they are counted."""
    check_reachable(config, lambda budgets: flops_of(budgets, config, geometry), target_flops)


def flops_of(budgets: Sequence[int], config: EarlyTomConfig, geometry: VisionGeometry) -> int:
    """FLOPs of the tower for one clip, with as many frames left; also where they are too few to hold the retain ratio
    and all their patches stay, as under the released rules."""
    retain = config.retain
    if budgets[-1] < least_frames(config.frames, retain):
        retain = budgets[-1] / config.frames
    return tower_flops(config.replace(retain=retain, frame_budgets=tuple(budgets)), geometry).total


def unpruned_flops(config: EarlyTomConfig, geometry: VisionGeometry) -> int:
    return tower_flops(unpruned_config(config), geometry).total
