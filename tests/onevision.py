"""The golden end-to-end checkpoint as transformers' LlavaOnevision: the same weights under the other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from earlytom import load
from earlytom.checkpoint.keys import PARTS, key_of

IMAGE, VIDEO = 500, 501  # of the 512 ids, none of which a golden prompt or answer has


def load_onevision(directory: Path) -> LlavaOnevisionForConditionalGeneration:
    """LlavaOnevision over a small LLaVA-NeXT checkpoint."""
    flat: dict[str, Any] = json.loads((directory / "config.json").read_text())
    vision = json.loads((directory / flat["mm_vision_tower"] / "config.json").read_text())
    loaded = load(directory)
    state = {
        key_of((part, name), "transformers"): tensor
        for part in PARTS
        for name, tensor in getattr(loaded, part).state_dict().items()
    }
    text = {k: v for k, v in flat.items() if k not in ("architectures", "model_type", "rope_scaling")}
    config = LlavaOnevisionConfig(
        vision_config=vision | {"num_hidden_layers": vision["num_hidden_layers"] - 1, "vision_use_head": False},
        text_config=text | {"model_type": "qwen2"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=flat["image_grid_pinpoints"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)
    return model.eval().requires_grad_(False)


def expand(prompt: list[int], frames: int) -> Tensor:
    """A golden prompt, -200 for the video, as the processor writes it: ids [1, P] with a placeholder for each token."""
    return torch.tensor([[x for token in prompt for x in ([VIDEO] * (frames * 196 + 1) if token == -200 else [token])]])


def question(model: Any, prompt: list[int], pixels: Tensor) -> dict[str, Any]:
    """What `generate` of a live model of either kind takes for a golden prompt about pixels [T, 3, H, W]."""
    if model.config.model_type == "llava_onevision":
        return {"input_ids": expand(prompt, len(pixels)), "pixel_values_videos": pixels[None]}
    return {"inputs": torch.tensor([prompt]), "images": [pixels], "modalities": ["video"]}
