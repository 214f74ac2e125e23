"""FLOPs of the tower, by stage: what PyTorch's FlopCounterMode counts of `StaticTower`, from sizes alone.

A multiply and an add are two FLOPs. Matrix products and the patch embedding count, of attention the whole square of
patches; element-wise work, softmax, norms, pooling and the distances of DPC-KNN do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import EarlyTomConfig
from ..shapes import derive_shapes
from ..vision.geometry import VisionGeometry


@dataclass(frozen=True)
class StageFlops:
    """A run of encoder layers, first to last, on the same number of frames."""

    layers: tuple[int, int]
    frames: int
    flops_per_layer: int

    @property
    def flops(self) -> int:
        return self.flops_per_layer * (self.layers[1] - self.layers[0] + 1)


@dataclass(frozen=True)
class TowerFlops:
    """FLOPs of one call of a tower, by part; merging: similarities, attention received, plans, their
    products, contextual tokens' means."""

    stages: tuple[StageFlops, ...]
    embedding: int
    merging: int
    projector: int

    @property
    def vision(self) -> int:
        """All but the projector."""
        return sum(stage.flops for stage in self.stages) + self.embedding + self.merging

    @property
    def total(self) -> int:
        return self.vision + self.projector


def tower_flops(config: EarlyTomConfig, geometry: VisionGeometry, batch: int = 1) -> TowerFlops:
    """FLOPs of one call of the tower with `config`; unpruned: with `unpruned_config(config)`."""
    shapes = derive_shapes(config, geometry, batch)
    s, d, out = shapes.patches, shapes.hidden_size, shapes.projector_size
    per_frame = 2 * s * d * (4 * d + 2 * s + 2 * geometry.intermediate_size)
    stages: list[StageFlops] = []
    first = 0
    for frames, last in zip(shapes.stage_frames, (*config.merge_layers, geometry.layers - 1)):
        if first <= last:
            stages.append(StageFlops((first, last), frames, batch * frames * per_frame))
        first = last + 1
    merging = 0
    for k, (entering, left) in enumerate(zip(shapes.stage_frames, shapes.stage_frames[1:])):
        merging += 2 * entering**2 * s * d + 2 * left * entering * s * d  # C, then W applied
        merging += _reached(entering + 1, entering) + _reached(entering, entering)  # segments, walk
        merging += 2 * left * entering * config.frames if k else 0  # the product of the W's
    b = shapes.final_frames
    if config.merge_layers:
        merging += 2 * shapes.stage_frames[-2] * s**2 * d  # q k^T once more, for the attention received
        merging += 2 * b * shapes.stage_frames[-2] * s + 2 * b**2 * s * d + _reached(b + 1, b)
        merging += 2 * b * shapes.contextual * (shapes.pooled_patches - shapes.dominant) * out
    # Pooling commutes with the second Linear, which then runs on the kept patches alone (tower.py).
    late = bool(config.merge_layers) and config.pooling != "max" and not shapes.contextual
    return TowerFlops(
        tuple(stages),
        embedding=batch * config.frames * 2 * s * d * 3 * geometry.patch_size**2,
        merging=batch * merging,
        projector=batch * b * 2 * out * (s * d + (shapes.keep if late else s) * out),
    )


def unpruned_config(config: EarlyTomConfig) -> EarlyTomConfig:
    """The same tower with every frame and patch kept."""
    return config.replace(retain=1.0, merge_layers=(), frame_budgets=(), contextual=0.0, inner=None)


def _reached(nodes: int, steps: int) -> int:
    """Of frames._reached: squarings of a 0/1 matrix."""
    return max(1, steps).bit_length() * 2 * (nodes**2 + nodes**3)
