"""The static tower: SigLIP with planned frame merging and token selection, every shape fixed.

Frames in, visual tokens out, no data-dependent shape or branch, so that one `torch.export` program, one ONNX graph and
one TensorRT engine serve every clip. V videos, T frames, S patches, B frames left, n patches kept of each, L LLM width.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ATTENTION_FORMS, EarlyTomConfig
from .errors import ConfigError, InputError
from .frames import apply_plan, plan, segments, similarity
from .newlines import append_newline, grid_token_count, insert_grid_newlines
from .shapes import StaticShapes, derive_shapes
from .tokens import gather_tokens, select_contextual, select_positions
from .vision.siglip import Vision, pool


def split_videos(outputs: TowerOutputs, config: EarlyTomConfig, grid: int) -> list[TowerOutputs]:
    """The videos of one call, each without its leading dimension and without the padding of grid newlines.

    grid: pooled patches on a side of a frame.
    """
    videos = []
    for v in range(outputs.tokens.shape[0]):
        tokens, positions, dynamic, weights = (x[v] for x in outputs)
        if config.newline == "grid":
            tokens = tokens[: int(grid_token_count(positions[None], grid))]
        videos.append(TowerOutputs(tokens, positions, dynamic, weights))
    return videos


class TowerOutputs(NamedTuple):
    """What leaves the tower.

    tokens [V, N, L]: visual tokens as the LLM takes them, newlines included; positions [V, B, n] int64: where on the
    pooled grid each kept patch lies; dynamic [V, B] bool; weights [V, B, T] float32: for each frame left, its mix of
    source frames (the product of all plans).
    """

    tokens: Tensor
    positions: Tensor
    dynamic: Tensor
    weights: Tensor


class Stage(NamedTuple):
    """One merge layer: C [V, T_in, T_in], W [V, T_out, T_in], hidden states after merging [V, T_out, S, D]."""

    similarity: Tensor
    weights: Tensor
    hidden: Tensor


class TowerTrace(NamedTuple):
    """Everything a choice was made from: the merge layers in order, and what stage II saw.

    similarity [V, B, B]: of the frames left; received [V, B, P]: pooled attention. Both are None in an unpruned tower.
    """

    outputs: TowerOutputs
    stages: tuple[Stage, ...]
    similarity: Tensor | None
    received: Tensor | None


def check_training(vision: Vision, config: EarlyTomConfig) -> None:
    """Raise ConfigError unless the configuration pools and separates frames as the checkpoint was trained to."""
    for name in ("pooling", "newline"):
        if getattr(config, name) != getattr(vision, name):
            raise ConfigError(
                f"the configuration has {name} {getattr(config, name)}, but the checkpoint was trained with "
                f"{getattr(vision, name)}: use {name}={getattr(vision, name)!r}"
            )


class StaticTower(nn.Module):
    """`vision` with EarlyTom as `config` says, for `batch` videos a call. The weights are shared, not copied.

    attention: "fused" (scaled_dot_product_attention) or "primitives" (written out, for graphs without an attention
    operator). Raises ConfigError when the configuration does not fit the tower's geometry or disagrees with how the
    checkpoint pools and separates frames.
    """

    def __init__(self, vision: Vision, config: EarlyTomConfig, *, batch: int = 1, attention: str = "fused") -> None:
        super().__init__()
        if attention not in ATTENTION_FORMS:
            raise ConfigError(f"attention is {attention!r}, it must be one of {', '.join(ATTENTION_FORMS)}")
        check_training(vision, config)
        self.vision, self.config, self.attention = vision, config, attention
        self.shapes: StaticShapes = derive_shapes(config, vision.geometry, batch)

    def forward(self, frames: Tensor) -> TowerOutputs:
        """Frames uint8 [V, T, H, W, 3] -> TowerOutputs."""
        return self.trace(frames).outputs

    def trace(self, frames: Tensor) -> TowerTrace:
        """As `forward`, with the similarities, plans and hidden states that led there."""
        expected = self.shapes.inputs["frames"][1]
        if tuple(frames.shape) != expected or frames.dtype != torch.uint8:
            raise InputError(
                f"frames are {frames.dtype} {list(frames.shape)}, the tower takes torch.uint8 {list(expected)}"
            )
        # uint8 is cast before anything else: TensorRT takes it as a network input only.
        return self._run(self.vision.embed(frames.to(torch.float32).flatten(0, 1)))

    def encode_pixels(self, pixels: Tensor) -> TowerOutputs:
        """As `forward`, from normalised pixels [V, T, 3, H, W] as an image processor gives them."""
        v, t, h, w, c = self.shapes.inputs["frames"][1]
        if tuple(pixels.shape) != (v, t, c, h, w) or not pixels.is_floating_point():
            raise InputError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}, the tower takes floating point {[v, t, c, h, w]}"
            )
        return self._run(self.vision.embed_pixels(pixels.flatten(0, 1))).outputs

    def _run(self, hidden: Tensor) -> TowerTrace:
        """Patch embeddings [V*T, S, D] -> TowerTrace."""
        shapes, config, vision = self.shapes, self.config, self.vision
        v = shapes.batch
        budgets = dict(zip(config.merge_layers, config.frame_budgets))
        stages: list[Stage] = []
        received: Tensor | None = None
        for index, layer in enumerate(vision.layers):
            last_merge = bool(budgets) and index == config.merge_layers[-1]
            hidden, attention = layer(hidden, self.attention, received=last_merge)
            if index not in budgets:
                continue
            per_video = hidden.unflatten(0, (v, -1))  # [V, T_in, S, D]
            alike = similarity(per_video)
            weights = plan(alike, budget=budgets[index], **config.segmenting)
            per_video = apply_plan(weights, per_video)
            stages.append(Stage(alike, weights, per_video))
            if attention is not None:
                received = apply_plan(weights, attention.unflatten(0, (v, -1)))  # [V, B, S]
            hidden = per_video.flatten(0, 1)

        if received is None:  # no merge layers
            return TowerTrace(self._unpruned(hidden), (), None, None)
        alike = similarity(stages[-1].hidden)
        dynamic = segments(alike, **config.segmenting).dynamic
        received = pool(received.flatten(0, 1)[..., None], config.pooling)[..., 0].unflatten(0, (v, -1))  # [V, B, P]
        tokens, positions = self._select(hidden, received, dynamic)
        composite = reduce(lambda product, weights: weights @ product, (stage.weights for stage in stages))
        outputs = TowerOutputs(self._separate(tokens, positions), positions, dynamic, composite)
        return TowerTrace(outputs, tuple(stages), alike, received)

    def _select(self, hidden: Tensor, received: Tensor, dynamic: Tensor) -> tuple[Tensor, Tensor]:
        """Project, pool and keep: hidden [V*B, S, D] -> tokens [V, B, n, L], positions [V, B, n]."""
        shapes, config, vision = self.shapes, self.config, self.vision
        positions = select_positions(received, dynamic, shapes.keep)
        if config.pooling != "max" and not shapes.contextual:
            # Pooling is linear with weights that sum to 1, so it commutes with the second Linear, which then runs on
            # the kept patches alone.
            pooled = pool(vision.widen(hidden), config.pooling).unflatten(0, (shapes.batch, -1))
            return vision.linear_2(gather_tokens(pooled, positions)), positions
        features = pool(vision.project(hidden), config.pooling)  # [V*B, P, L]
        tokens = gather_tokens(features.unflatten(0, (shapes.batch, -1)), positions)
        if shapes.contextual:
            mixed, places = select_contextual(
                features, received.flatten(0, 1), dominant=shapes.dominant, contextual=shapes.contextual,
                neighbours=config.neighbours, beta=config.beta,
            )
            mixed, places = mixed.view_as(tokens), places.view_as(positions)
            tokens = torch.where(dynamic[..., None, None], mixed, tokens)
            positions = torch.where(dynamic[..., None], places, positions)
        return tokens, positions

    def _unpruned(self, hidden: Tensor) -> TowerOutputs:
        shapes = self.shapes
        v, t, p = shapes.batch, shapes.frames, shapes.pooled_patches
        tokens = pool(self.vision.project(hidden), self.config.pooling).unflatten(0, (v, t))
        positions = torch.arange(p, device=hidden.device).expand(v, t, p).contiguous()
        dynamic = torch.ones(v, t, dtype=torch.bool, device=hidden.device)
        weights = torch.eye(t, device=hidden.device).expand(v, t, t).contiguous()
        return TowerOutputs(self._separate(tokens, positions), positions, dynamic, weights)

    def _separate(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [V, B, n, L] -> the LLM's sequence [V, N, L], newlines in place."""
        newline = self.vision.image_newline
        if self.config.newline == "grid":
            return insert_grid_newlines(tokens, positions, newline, self.shapes.pooled_grid)
        return tokens.flatten(1, 2) if self.config.newline == "no_token" else append_newline(tokens, newline)
