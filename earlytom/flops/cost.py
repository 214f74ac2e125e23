"""What a call of the tower costs before and after EarlyTom: FLOPs, and the memory it takes at its widest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import EarlyTomConfig
from ..dtypes import DTYPES
from ..language.geometry import PUBLISHED
from ..shapes import StaticShapes, derive_shapes
from ..vision.geometry import QUERY_BLOCKS, VisionGeometry
from .published import prefill_flops
from .tower import TowerFlops, tower_flops, unpruned_config


@dataclass(frozen=True)
class CallCost:
    """One call: FLOPs of the tower, the tensors that its widest layer keeps at once, what reaches the LLM.

    activation_bytes is an estimate, with attention fused. prefill_flops: of the visual
    tokens by the paper's formula, None where the LLM's width is not that of a published one; `model_work` has the LLM
    exactly.
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


def tower_cost(config: EarlyTomConfig, geometry: VisionGeometry, *, batch: int = 1, dtype: str = "fp32") -> TowerCost:
    """FLOPs and memory of one call of `batch` videos, weights and activations in `dtype`."""
    before, after = (_call_cost(c, geometry, batch, DTYPES[dtype].bytes) for c in (unpruned_config(config), config))
    return TowerCost(before, after, weight_count(geometry) * DTYPES[dtype].bytes)


def _call_cost(config: EarlyTomConfig, geometry: VisionGeometry, batch: int, size: int) -> CallCost:
    shapes, prefill = derive_shapes(config, geometry, batch), None
    if (llm := PUBLISHED.get(geometry.projector_size)) is not None:
        prefill = batch * prefill_flops(
            shapes.tokens, llm.hidden_size, llm.intermediate_size, llm.layers, config=config
        )
    activations = _activation_bytes(config, geometry, shapes, size)
    return CallCost(tower_flops(config, geometry, batch), activations, shapes.tokens, prefill)


def encoder_weight_count(geometry: VisionGeometry) -> int:
    """Numbers in the weights of patch embedding and encoder."""
    d, i = geometry.hidden_size, geometry.intermediate_size
    layer = 4 * (d * d + d) + 2 * d * i + i + d + 4 * d
    return 3 * geometry.patch_size**2 * d + d + geometry.patches * d + geometry.layers * layer


def projector_weight_count(geometry: VisionGeometry) -> int:
    """Numbers in the weights of the projector, newline included."""
    d, out = geometry.hidden_size, geometry.projector_size
    return d * out + out + out * out + out + out


def weight_count(geometry: VisionGeometry) -> int:
    """Numbers in the tower's weights, projector and newline included."""
    return encoder_weight_count(geometry) + projector_weight_count(geometry)


def _activation_bytes(config: EarlyTomConfig, geometry: VisionGeometry, shapes: StaticShapes, size: int) -> int:
    d, s = geometry.hidden_size, geometry.patches
    per_patch = max(2 * d + 2 * geometry.intermediate_size, 5 * d)  # x, norm, fc1, GELU; or x, q, k, v, mixed
    widest = shapes.batch * config.frames * s * per_patch * size
    if not config.merge_layers:
        return widest
    # At the last merge layer, of one block of queries: product, its cast to float32 where it is not, softmax.
    rows = geometry.heads * -(-s // QUERY_BLOCKS) * s * (8 + (size if size < 4 else 0))
    received = shapes.batch * shapes.stage_frames[-2] * (s * 5 * d * size + rows)
    return max(widest, received)
