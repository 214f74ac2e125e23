"""The adaptive tower: EarlyTom as published, frame counts following the data, on a live PyTorch model.

Its steps are those of the static tower. What differs is that each merge layer leaves as many frames as the released
rules leave, and that the patches kept of a frame follow from that, as in the released code: where a plan's budget is
what the rules leave, the plan is the released merging (docs/method.md, section 4). Its answers are the oracle's
(reference.py), without its loops over frames and patches. Nothing of it can be exported. T frames, S patches, B frames
left, P pooled patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import EarlyTomConfig
from .errors import InputError
from .frames import apply_plan, merge_rules, plan, segments, similarity
from .shapes import check_fit
from .tokens import gather_tokens, grid_sequence, select_contextual, select_positions
from .tower import TowerOutputs, check_training
from .vision.siglip import Vision, pool


class AdaptiveTower(nn.Module):
    """`vision` with EarlyTom as `config` says, but for its `frames` and `frame_budgets`, which are not used.

    One clip of any number of frames at a time. The weights are shared, not copied. Raises ConfigError when a merge
    layer does not exist, or when the configuration disagrees with how the checkpoint pools and separates frames.
    """

    def __init__(self, vision: Vision, config: EarlyTomConfig) -> None:
        super().__init__()
        check_training(vision, config)
        self.vision, self.config = vision, config
        self.side = check_fit(config, vision.geometry)  # of the pooled grid

    def forward(self, frames: Tensor) -> TowerOutputs:
        """Frames uint8 [1, T, H, W, 3] -> what `encode` gives, each with a leading 1: an encoder for VideoPipeline."""
        if frames.dim() != 5 or len(frames) != 1:
            raise InputError(f"frames are {list(frames.shape)}, the tower takes one clip [1, T, H, W, 3] a call")
        return TowerOutputs(*(output[None] for output in self.encode(frames[0])))

    def encode(self, frames: Tensor) -> TowerOutputs:
        """Frames uint8 [T, H, W, 3] -> TowerOutputs of one video, without their leading dimension.

        tokens [N, L]: the sequence as the LLM takes it, newlines included, nothing padded; dynamic [B]; weights [B, T].
        Dynamic frames keep ceil(P*r') patches and static ones round(P*r') (r' = min(1, r*T/B)), so positions [B, n],
        n = ceil(P*r'), end with -1 where a frame kept one less. Raises InputError.
        """
        side = self.vision.geometry.image_size
        if frames.dim() != 4 or not len(frames) or frames.shape[1:] != (side, side, 3) or frames.dtype != torch.uint8:
            raise InputError(
                f"frames are {frames.dtype} {list(frames.shape)}, the tower takes torch.uint8 [T, {side}, {side}, 3]"
            )
        return self._run(self.vision.embed(frames.to(self.vision.device)))

    def encode_pixels(self, pixels: Tensor) -> TowerOutputs:
        """As `encode`, from normalised pixels [T, 3, H, W] as an image processor gives them."""
        side = self.vision.geometry.image_size
        fits = pixels.dim() == 4 and len(pixels) and pixels.shape[1:] == (3, side, side)
        if not fits or not pixels.is_floating_point():
            raise InputError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}, the tower takes floating point [T, 3, {side}, {side}]"
            )
        return self._run(self.vision.embed_pixels(pixels.to(self.vision.device)))

    @torch.no_grad()
    def _run(self, hidden: Tensor) -> TowerOutputs:
        """Patch embeddings [T, S, D] -> TowerOutputs."""
        config, vision, frames = self.config, self.vision, len(hidden)
        weights = torch.eye(frames, device=hidden.device)
        dynamic = weights.new_ones(frames, dtype=torch.bool)
        received: Tensor | None = None
        for index, layer in enumerate(vision.layers):
            hidden, attention = layer(hidden, received=config.merge_layers[-1:] == (index,))
            if index not in config.merge_layers:
                continue
            step = released_plan(hidden, config)
            hidden, weights = apply_plan(step, hidden), step @ weights
            if attention is not None:  # the last merge layer: its scores and segments are stage II's
                received = apply_plan(step, attention)  # [B, S]
                dynamic = segments(similarity(hidden), **config.segmenting).dynamic  # [B]

        features = pool(vision.project(hidden), config.pooling)  # [B, P, L]
        if received is None:  # no merge layers: the unpruned model
            positions = torch.arange(features.shape[1], device=hidden.device).expand(frames, -1)
            return TowerOutputs(self._separate(features.flatten(0, 1), positions), positions, dynamic, weights)
        received = pool(received[..., None], config.pooling)[..., 0]  # [B, P]
        ratio = min(1.0, config.retain / (len(hidden) / frames))  # r', rounded as the released code rounds it
        tokens, positions = self._select(features, received, dynamic, ratio)
        return TowerOutputs(self._separate(tokens, positions), positions, dynamic, weights)

    def _select(self, features: Tensor, received: Tensor, dynamic: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """Stage II at r' = ratio: tokens [N, L] frame by frame, positions [B, n] padded with -1."""
        config, patches = self.config, features.shape[1]
        most, fewest = math.ceil(patches * ratio), max(1, round(patches * ratio))  # of a dynamic, of a static frame
        dominant = round(most * (1 - config.contextual))
        positions = dynamic.new_full((len(dynamic), most), -1, dtype=torch.int64)
        kept = features.new_empty(len(dynamic), most, features.shape[2])
        still = ~dynamic
        positions[still, :fewest] = select_positions(received[still], dynamic[still], fewest)
        kept[still, :fewest] = gather_tokens(features[still], positions[still, :fewest])
        if dominant < most:
            kept[dynamic], positions[dynamic] = select_contextual(
                features[dynamic], received[dynamic], dominant=dominant, contextual=most - dominant,
                neighbours=config.neighbours, beta=config.beta,
            )
        else:
            positions[dynamic] = select_positions(received[dynamic], dynamic[dynamic], most)
            kept[dynamic] = gather_tokens(features[dynamic], positions[dynamic])
        return kept[positions >= 0], positions

    def _separate(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [N, L], those of positions [B, n] in order -> the LLM's sequence, newlines in place."""
        newline = self.vision.image_newline
        if self.config.newline == "grid":
            return grid_sequence(tokens, positions, newline, self.side)
        return tokens if self.config.newline == "no_token" else torch.cat([tokens, newline[None]])


def released_plan(hidden: Tensor, config: EarlyTomConfig) -> Tensor:
    """Tokens [T, S, D] -> the merging plan [B, T] that leaves as many frames as the released rules leave."""
    alike = similarity(hidden)
    return plan(alike, budget=released_count(alike, config), **config.segmenting)


def released_count(similarity: Tensor, config: EarlyTomConfig) -> int:
    """How many frames the released rules leave of C [T, T]."""
    removed = merge_rules(similarity, segments(similarity, **config.segmenting)).removed
    return len(similarity) - int(removed.sum())
