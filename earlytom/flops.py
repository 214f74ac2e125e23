"""What the tower costs with and without EarlyTom: matrix-product FLOPs by stage, memory, and the LLM's prefill.

A multiply and an add are two FLOPs here, except in `prefill_flops`, which is the paper's own formula. Element-wise
work, softmax, pooling and DPC-KNN are not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .config import EarlyTomConfig
from .dtypes import DTYPES
from .shapes import StaticShapes, derive_shapes
from .vision.geometry import VisionGeometry

# Width of the LLM -> (layers, intermediate size): the Qwen2 models that LLaVA-OneVision and LLaVA-Video come with.
QWEN2_SIZES = {896: (24, 4864), 3584: (28, 18944), 8192: (80, 29568)}


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
    """FLOPs of one call of a tower, by part; merging: similarities, plans and their products."""

    stages: tuple[StageFlops, ...]
    embedding: int
    merging: int
    projector: int

    @property
    def total(self) -> int:
        return sum(stage.flops for stage in self.stages) + self.embedding + self.merging + self.projector


@dataclass(frozen=True)
class CallCost:
    """One call: FLOPs of the tower, the tensors that its widest layer keeps at once, what reaches the LLM.

    activation_bytes is an estimate: attention fused except where its matrix is needed. prefill_flops: of the visual
    tokens, None where the LLM's sizes are not known from its width.
    """

    flops: TowerFlops
    activation_bytes: int
    tokens: int
    prefill_flops: int | None


@dataclass(frozen=True)
class TowerCost:
    """FLOPs and memory of one call before (nothing pruned) and after."""

    before: CallCost
    after: CallCost
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: each number as `..._before` and `..._after`; stages: those after."""
        out: dict[str, Any] = {"weight_bytes": self.weight_bytes}
        for when, cost in (("before", self.before), ("after", self.after)):
            out |= {
                f"flops_{when}": cost.flops.total, f"activation_bytes_{when}": cost.activation_bytes,
                f"tokens_{when}": cost.tokens,
            }
            if cost.prefill_flops is not None:
                out[f"prefill_flops_{when}"] = cost.prefill_flops
        out["stages"] = [asdict(stage) | {"flops": stage.flops} for stage in self.after.flops.stages]
        return out


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
        merging += 2 * b * shapes.stage_frames[-2] * s + 2 * b**2 * s * d + _reached(b + 1, b)
    # Pooling commutes with the second Linear, which then runs on the kept patches alone (tower.py).
    late = bool(config.merge_layers) and config.pooling != "max" and not shapes.contextual
    return TowerFlops(
        tuple(stages),
        embedding=batch * config.frames * 2 * s * d * 3 * geometry.patch_size**2,
        merging=batch * merging,
        projector=batch * b * 2 * out * (s * d + (shapes.keep if late else s) * out),
    )


def tower_cost(config: EarlyTomConfig, geometry: VisionGeometry, *, batch: int = 1, dtype: str = "fp32") -> TowerCost:
    """FLOPs and memory of one call of `batch` videos, weights and activations in `dtype`."""
    before, after = (_call_cost(c, geometry, batch, DTYPES[dtype].bytes) for c in (unpruned_config(config), config))
    return TowerCost(before, after, weight_count(geometry) * DTYPES[dtype].bytes)


def _call_cost(config: EarlyTomConfig, geometry: VisionGeometry, batch: int, size: int) -> CallCost:
    shapes, width = derive_shapes(config, geometry, batch), geometry.projector_size
    prefill = None
    if width in QWEN2_SIZES:
        layers, intermediate = QWEN2_SIZES[width]
        prefill = batch * prefill_flops(shapes.tokens, width, intermediate, layers, config=config)
    activations = _activation_bytes(config, geometry, shapes, size)
    return CallCost(tower_flops(config, geometry, batch), activations, shapes.tokens, prefill)


def prefill_flops(
    tokens: int, width: int, intermediate: int, layers: int, *, config: EarlyTomConfig | None = None
) -> int:
    """FLOPs of the LLM's prefill over `tokens` visual tokens: 4nd^2 + 2n^2d + 2ndm for each layer.

    That is the formula of the paper's code, in which a multiply-add is one FLOP and the MLP has two products. config:
    whose inner merging leaves fewer tokens from its layer on.
    """

    def layer(n: int) -> int:
        return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * intermediate

    inner = config.inner if config is not None else None
    if inner is None or inner.layer >= layers:
        return layers * layer(tokens)
    return inner.layer * layer(tokens) + (layers - inner.layer) * layer(tokens - inner.removed(tokens))


def unpruned_config(config: EarlyTomConfig) -> EarlyTomConfig:
    """The same tower with every frame and patch kept."""
    return config.replace(retain=1.0, merge_layers=(), frame_budgets=(), contextual=0.0, inner=None)


def weight_count(geometry: VisionGeometry) -> int:
    """Numbers in the tower's weights, projector and newline included."""
    d, i, out = geometry.hidden_size, geometry.intermediate_size, geometry.projector_size
    layer = 4 * (d * d + d) + 2 * d * i + i + d + 4 * d
    embedding = 3 * geometry.patch_size**2 * d + d + geometry.patches * d
    return embedding + geometry.layers * layer + d * out + out + out * out + out + out


def _reached(nodes: int, steps: int) -> int:
    """Of frames._reached: squarings of a 0/1 matrix."""
    return max(1, steps).bit_length() * 2 * (nodes**2 + nodes**3)


def _activation_bytes(config: EarlyTomConfig, geometry: VisionGeometry, shapes: StaticShapes, size: int) -> int:
    d, s = geometry.hidden_size, geometry.patches
    per_patch = max(2 * d + 2 * geometry.intermediate_size, 5 * d)  # x, norm, fc1, GELU; or x, q, k, v, mixed
    widest = shapes.batch * config.frames * s * per_patch * size
    if not config.merge_layers:
        return widest
    frames = shapes.batch * shapes.stage_frames[-2]  # at the last merge layer: product, softmax in float32, its cast
    matrix = frames * (s * 5 * d * size + geometry.heads * s * s * (4 + 2 * size))
    return max(widest, matrix)
