"""A stand-in for LLaVA-NeXT's LlavaQwenForCausalLM, which is not on PyPI: its module names, its generate, no more.

Written from the public names and behaviour of llava_qwen.py, llava_arch.py and siglip_encoder.py; nothing is pruned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, SiglipVisionConfig, SiglipVisionModel

from earlytom.vision.siglip import pool


class SigLipVisionTower(nn.Module):
    """Holds SigLIP less its last layer, under the names vision_tower.vision_model."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config)
        if not hasattr(self.vision_tower, "vision_model"):  # transformers 5
            model, self.vision_tower = self.vision_tower, nn.Module()
            self.vision_tower.vision_model = model
        del self.vision_tower.vision_model.encoder.layers[-1:]

    def forward(self, pixels: Tensor) -> Tensor:
        tower = self.vision_tower
        model = tower if isinstance(tower, SiglipVisionModel) else tower.vision_model
        states = model(pixels, output_hidden_states=True).hidden_states
        return states[len(self.vision_tower.vision_model.encoder.layers)]


class LlavaQwenModel(Qwen2Model):
    def __init__(self, config: Qwen2Config, vision: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.vision_tower = SigLipVisionTower(vision)
        self.mm_projector = nn.Sequential(
            nn.Linear(vision.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))


class LlavaQwenForCausalLM(Qwen2ForCausalLM):
    def __init__(self, config: Qwen2Config, vision: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.model = LlavaQwenModel(config, vision)

    def get_vision_tower(self) -> SigLipVisionTower:
        return self.model.vision_tower

    @torch.no_grad()
    def generate(
        self, inputs: Tensor, images: Any = None, image_sizes: Any = None, modalities: Any = ("image",), **kwargs: Any
    ) -> Tensor:
        if images is None:
            return super().generate(inputs, **kwargs)
        features = pool(self.model.mm_projector(self.model.vision_tower(images[0])), self.config.mm_spatial_pool_mode)
        tokens = torch.cat([features.flatten(0, 1), self.model.image_newline[None]])
        at = int((inputs[0] == -200).nonzero())
        words = self.model.embed_tokens
        embeds = torch.cat([words(inputs[0, :at]), tokens, words(inputs[0, at + 1 :])])
        return super().generate(inputs_embeds=embeds[None], **kwargs)


def load_stand_in(directory: Path) -> LlavaQwenForCausalLM:
    """The stand-in with the weights of a small LLaVA-NeXT checkpoint whose tower's configuration lies in it."""
    config = json.loads((directory / "config.json").read_text())
    vision = json.loads((directory / config["mm_vision_tower"] / "config.json").read_text())
    text = Qwen2Config(
        **{k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype", "rope_scaling")}
    )
    model = LlavaQwenForCausalLM(text, SiglipVisionConfig(**vision))
    state = load_file(directory / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all("vision_model.head" in name for name in missing), missing  # LLaVA-NeXT leaves the pooling head out
    return model.eval().requires_grad_(False)
