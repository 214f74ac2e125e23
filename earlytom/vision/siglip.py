"""The vision side of a LLaVA model, plain: SigLIP encoder, projector, pooling. No frame is merged here.

Written to be read and exported: tensors in, tensors out, no branch on data. Shapes: N frames, S patches, D width,
H heads, P pooled patches, L LLM width.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from .geometry import QUERY_BLOCKS, VisionGeometry, pooled_grid


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in float32 whatever the dtype around it: fp16 overflows in its sum of squares."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def attention_rows(q: Tensor, keys: Tensor) -> Tensor:
    """Rows of the attention matrix: q [N, H, Q, D/H], scaled, keys [N, H, D/H, S] -> [N, H, Q, S] float32.

    The cast is written out because softmax(dtype=...) exports as a softmax before its cast; TensorRT fuses across it
    and then keeps product and softmax in float32 (docs/onnx.md).
    """
    return torch.softmax((q @ keys).to(torch.float32), dim=-1)


class ReceivedAttention(nn.Module):
    """The attention that each patch received, mean over heads and queries. A module for the name of its nodes."""

    def forward(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """q, k [N, H, S, D/H] -> [N, S] float32.

        In blocks of queries: the matrix [N, H, S, S] of all would be the largest tensor of the tower.
        """
        _, heads, s, _ = q.shape
        keys = k.transpose(-1, -2).contiguous()  # [N, H, D/H, S], laid out once for all blocks
        # Scaled block by block: the attention beside stays the only reader of its own scaled q.
        blocks = q.contiguous().chunk(QUERY_BLOCKS, dim=2)
        total = reduce(torch.add, (attention_rows(block * scale, keys).sum(dim=(1, 2)) for block in blocks))
        return total / (heads * s)


class Attention(nn.Module):
    """Bidirectional multi-head attention, scale head_dim ** -0.5."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.received = ReceivedAttention()

    def forward(self, x: Tensor, form: str = "fused", received: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [N, S, D] -> ([N, S, D], attention that each patch received [N, S] float32, or None).

        form: "fused" calls scaled_dot_product_attention; "primitives" writes it out with q scaled first and nothing
        between q.k^T and the softmax, the pattern that compilers fuse. The received attention is computed beside
        either: no fused attention gives it, and one whose matrix is read by others is not fused.
        """
        n, s, d = x.shape
        q, k, v = (
            proj(x).view(n, s, self.heads, d // self.heads).transpose(1, 2)  # [N, H, S, D/H]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mean = self.received(q, k, self.scale) if received else None
        if form == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            mixed = attention_rows(q * self.scale, k.transpose(-1, -2)).to(v.dtype) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(n, s, d)), mean


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with a tanh-GELU MLP."""

    def __init__(self, geometry: VisionGeometry) -> None:
        super().__init__()
        width, eps = geometry.hidden_size, geometry.layer_norm_eps
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(width, geometry.heads)
        self.norm2 = LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, geometry.intermediate_size)
        self.fc2 = nn.Linear(geometry.intermediate_size, width)

    def forward(self, x: Tensor, form: str = "fused", received: bool = False) -> tuple[Tensor, Tensor | None]:
        mixed, mean = self.attention(self.norm1(x), form, received)
        x = x + mixed
        del mixed  # or it would stay beside the MLP's, where a layer keeps most
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh")), mean


class Vision(nn.Module):
    """SigLIP encoder, projector and newline embedding of a LLaVA checkpoint, on `geometry`.

    pooling and newline are how the checkpoint was trained (LLaVA-NeXT's mm_spatial_pool_mode, mm_newline_position).
    """

    def __init__(self, geometry: VisionGeometry, pooling: str = "bilinear", newline: str = "one_token") -> None:
        super().__init__()
        self.geometry, self.pooling, self.newline = geometry, pooling, newline
        width, out = geometry.hidden_size, geometry.projector_size
        self.patch_embedding = nn.Conv2d(3, width, geometry.patch_size, stride=geometry.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(geometry.patches, width))
        self.layers = nn.ModuleList(EncoderLayer(geometry) for _ in range(geometry.layers))
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)
        self.image_newline = nn.Parameter(torch.zeros(out))

    @property
    def dtype(self) -> torch.dtype:
        """Of the projector, and of the tokens; the encoder of a live model may have another."""
        return self.linear_1.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.linear_1.weight.device

    def embed(self, frames: Tensor) -> Tensor:
        """Frames uint8 [N, H, W, 3] -> patch embeddings [N, S, D]."""
        return self.embed_pixels(normalised(frames))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, H, W], as an image processor gives them -> patch embeddings [N, S, D]."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # [N, D, grid, grid]
        return patches.flatten(2).transpose(1, 2) + self.position_embedding

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [N, H, W, 3] -> features [N, S, D] of the last used layer, nothing pruned."""
        x = self.embed(frames)
        for layer in self.layers:
            x, _ = layer(x)
        return x

    def widen(self, features: Tensor) -> Tensor:
        """Features [..., D] -> [..., L], in the projector's dtype: its first Linear, and GELU."""
        return F.gelu(self.linear_1(features.to(self.dtype)))

    def project(self, features: Tensor) -> Tensor:
        """Features [..., D] -> [..., L]: Linear, GELU, Linear."""
        return self.linear_2(self.widen(features))

    def encode_all(self, frames: Tensor) -> Tensor:
        """Frames uint8 [T, H, W, 3] -> all visual tokens of the unpruned model [T*P + newlines, L]."""
        pooled = pool(self.project(self.encode(frames)), self.pooling)  # [T, P, L]
        t, p, width = pooled.shape
        if self.newline == "grid":
            side = pooled_grid(self.geometry.grid, self.pooling)
            rows = pooled.view(t * side, side, width)
            return torch.cat([rows, self.image_newline.expand(t * side, 1, width)], dim=1).flatten(0, 1)
        tokens = pooled.flatten(0, 1)
        return tokens if self.newline == "no_token" else torch.cat([tokens, self.image_newline[None]])


def normalised(frames: Tensor) -> Tensor:
    """Frames uint8 [N, H, W, 3] -> pixels float32 [N, 3, H, W] as SigLIP takes them: (x/255 - 0.5)/0.5."""
    return ((frames.to(torch.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)


def pool(features: Tensor, pooling: str) -> Tensor:
    """Features [N, S, L] on a square grid -> [N, P, L]; bilinear 27 -> 14, average and max 27 -> 13.

    Source: `get_2dPool` in LLaVA-NeXT's `llava_arch.py`, stride 2.
    """
    n, s, width = features.shape
    side = int(s**0.5)
    if side * side != s:
        raise InputError(f"{s} patches do not form a square grid, so they cannot be pooled")
    grid = features.view(n, side, side, width).permute(0, 3, 1, 2)
    if pooling == "bilinear":
        out = pooled_grid(side, pooling)
        grid = F.interpolate(grid, size=(out, out), mode="bilinear", align_corners=False)
    elif pooling == "average":
        grid = F.avg_pool2d(grid, 2)
    elif pooling == "max":
        grid = F.max_pool2d(grid, 2)
    else:
        raise ConfigError(f"pooling is {pooling!r}, it must be bilinear, average or max")
    return grid.flatten(2).transpose(1, 2)
