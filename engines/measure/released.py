"""EarlyTom as its authors run it, for its cost: what is computed is the oracle's, how is theirs.

Eager attention in every layer; in each merge layer the attention matrix of all frames [T, H, S, S] is kept, and merged
frame by frame together with the hidden states; similarities are read back one by one, frames are walked over and
selected in loops. Source: siglip_encoder.py and llava_arch.py of the released code, whose SigLIP has no other attention
than that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from earlytom.config import EarlyTomConfig
from earlytom.errors import ConfigError
from earlytom.reference import OracleTrace, merge_plan, segment_frames, select_tokens, with_newlines
from earlytom.shapes import check_fit
from earlytom.tower import check_training
from earlytom.vision.siglip import EncoderLayer, Vision, pool

from .stopwatch import layers_span, merge_span

LAST = "vision: projector and selection"


class ReleasedTower:
    """`vision` with the released EarlyTom of `config`, whose frame budgets are not used. Raises ConfigError."""

    def __init__(self, vision: Vision, config: EarlyTomConfig) -> None:
        check_training(vision, config)
        if not config.merge_layers:
            raise ConfigError("the released EarlyTom needs merge layers, and there are none in this configuration")
        check_fit(config, vision.geometry)
        self.vision, self.config = vision, config

    @torch.no_grad()
    def encode(self, frames: Tensor, mark: Callable[[str], None] = lambda _: None) -> tuple[Tensor, tuple[int, ...]]:
        """Frames uint8 [T, H, W, 3] -> visual tokens [N, L] and the frames that each merge layer left."""
        config, vision = self.config, self.vision
        hidden = vision.embed(frames.to(vision.device))  # [T, S, D]
        mark("vision: patches")
        matrix, segments, counts = torch.empty(0), [(0, 0)], list[int]()
        first = 0
        for index, layer in enumerate(vision.layers):
            assert isinstance(layer, EncoderLayer)
            hidden, attention = eager_layer(layer, hidden)
            if index not in config.merge_layers:
                continue
            mark(layers_span(first, index))
            _, rows = merge_plan(hidden, **config.segmenting)
            hidden, matrix = mix(hidden, rows), mix(attention, rows)
            counts.append(len(hidden))
            if index == config.merge_layers[-1]:
                segments = segment_frames(hidden, **config.segmenting)
            mark(merge_span(index))
            first = index + 1
        if first < len(vision.layers):
            mark(layers_span(first, len(vision.layers) - 1))
        features = pool(vision.project(hidden), vision.pooling)  # [B, P, L]
        received = matrix.float().mean(dim=(1, 2))  # [B, S]
        pooled = pool(received[..., None].to(features.dtype), vision.pooling)[..., 0]
        ratio = min(1.0, config.retain / (len(hidden) / len(frames)))  # r'
        chosen = select_tokens(
            features, pooled, segments, retain_ratio=ratio, contextual=config.contextual,
            neighbours=config.neighbours, beta=config.beta,
        )
        tokens = with_newlines(vision, OracleTrace(*chosen, segments, pooled, ()))
        mark(LAST)
        return tokens, tuple(counts)


def eager_layer(layer: EncoderLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """An encoder layer with its attention written out: x [T, S, D] -> ([T, S, D], attention [T, H, S, S])."""
    attention, (n, s, d) = layer.attention, x.shape
    states = layer.norm1(x)
    q, k, v = (
        proj(states).view(n, s, attention.heads, d // attention.heads).transpose(1, 2)  # [T, H, S, D/H]
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = q @ k.transpose(2, 3) * attention.scale
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    x = x + attention.out_proj((weights @ v).transpose(1, 2).reshape(n, s, d))
    return x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x)), approximate="tanh")), weights


def mix(values: Tensor, rows: list[dict[int, float]]) -> Tensor:
    """Each frame left as its mix {source frame: weight} of values [T, ...]."""
    return torch.stack([reduce(torch.add, (w * values[i] for i, w in row.items())) for row in rows])
