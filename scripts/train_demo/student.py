"""What is trained: the demo's own modules, and those that only training needs, with weights from a seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import Qwen2Config, Qwen2ForCausalLM

from earlytom.checkpoint import demo_tokenizer
from earlytom.checkpoint.demo import TEXT, demo_geometry
from earlytom.checkpoint.keys import Slot
from earlytom.vision.siglip import Attention, Vision, pool

from .language import DESCRIPTION
from .tower import GRID, Heads

PARTS = ("tower", "heads", "describer", "projector", "language")


class Describer(nn.Module):
    """A perfect tower and its projector: what patches show, as words (language.py) -> visual tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.adapter, self.linear_1 = nn.Linear(DESCRIPTION, 96), nn.Linear(96, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, described: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(self.adapter(described))))


class Student(nn.Module):
    """Vision and language of the demo, heads and describer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.manual_seed(seed)
        geometry = demo_geometry()
        self.vision = Vision(geometry)
        self.heads = Heads(geometry.hidden_size)
        self.describer = Describer(geometry.projector_size)
        self.language = Qwen2ForCausalLM(
            Qwen2Config(vocab_size=demo_tokenizer.size(), attn_implementation="packed", **TEXT)
        )
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=_spread(name, parameter[0].numel()), generator=generator)
        with torch.no_grad():
            self.vision.position_embedding.copy_(0.6 * _waves(GRID, geometry.hidden_size))
            for attention in self.vision.modules():  # a patch first looks at what is like it and near it
                if isinstance(attention, Attention):
                    attention.k_proj.weight.copy_(attention.q_proj.weight)

    @property
    def device(self) -> torch.device:
        return self.vision.device

    def part(self, name: str) -> nn.Module:
        """One of PARTS."""
        vision = self.vision
        if name == "tower":
            places = nn.ParameterList([vision.position_embedding])
            return nn.ModuleList([vision.patch_embedding, vision.layers, places])
        if name == "projector":
            return nn.ModuleList([vision.linear_1, vision.linear_2, nn.ParameterList([vision.image_newline])])
        return {"heads": self.heads, "describer": self.describer, "language": self.language}[name]

    def matrices(self) -> list[nn.Parameter]:
        """The weights of linear maps inside layers, of the tower and of the language model."""
        layers = (*self.vision.layers, *self.language.model.layers)
        return [p for layer in layers for p in layer.parameters() if p.ndim == 2]

    def sequence(self, projected: Tensor) -> Tensor:
        """Projected patches [B, T, S, L] -> visual tokens with the newline at the end [B, T * P + 1, L]."""
        pooled = pool(projected.flatten(0, 1), self.vision.pooling).reshape(len(projected), -1, projected.shape[-1])
        return torch.cat([pooled, self.vision.image_newline.expand(len(pooled), 1, -1)], 1)

    def weights(self) -> dict[Slot, Tensor]:
        """What a checkpoint holds; SigLIP's post-layernorm, which nothing uses, is neutral."""
        width = self.vision.geometry.hidden_size
        found: dict[Slot, Tensor] = {("vision", k): v for k, v in self.vision.state_dict().items()}
        found |= {("language", k): v for k, v in self.language.state_dict().items()}
        found["vision", "siglip.post_layernorm.weight"] = torch.ones(width)
        found["vision", "siglip.post_layernorm.bias"] = torch.zeros(width)
        return {slot: tensor.detach().float().cpu().contiguous() for slot, tensor in found.items()}


def _spread(name: str, fan_in: int) -> float:
    """Standard deviation of a first weight: attention that is not uniform, residual branches that start small."""
    if name.endswith("embed_tokens.weight"):
        return 0.3
    if name.endswith(("lm_head.weight", "image_newline")) or name.startswith("heads"):
        return 0.02
    gain = 0.35 if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")) else 1.0
    return gain * fan_in**-0.5


def _waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of a patch's row and column [grid * grid, width]: what the position embedding starts from, so
    that a head can look to a side of where it stands from the first step on."""
    frequency = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(float(grid))[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)  # [grid, width / 2]
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, width)
