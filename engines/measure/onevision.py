"""transformers' own LLaVA-OneVision over our weights, shared, not copied: what full tokens cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlytom.checkpoint.keys import locate
from earlytom.errors import EngineError
from earlytom.language.prompt import VIDEO_TOKEN
from earlytom.vision.siglip import Vision, normalised

from .stopwatch import AFTER, BEFORE, GENERATION, PREFILL, SPLICE, FirstToken, Seam, Stopwatch, marking, tower_seams

POOLED = "vision: projector and pooling"


@dataclass(frozen=True)
class OneVision:
    """A LlavaOnevisionForConditionalGeneration and the stages it is measured in; video_id stands for a visual token."""

    model: Any
    visual_tokens: int
    seams: tuple[Seam, ...]
    special: tuple[int, int]  # ids that no prompt holds: of an image, of a video

    def answer(self, frames: Tensor, prompt: Sequence[int], new_tokens: int, watch: Stopwatch) -> list[int]:
        """Ids of an answer of `new_tokens` to a prompt with one -200 about frames uint8 [T, H, W, 3] on a CPU."""
        model, (_, video) = self.model, self.special
        device = model.model.image_newline.device
        clip = frames.to(device)
        watch.mark("copy")
        pixels = normalised(clip)[None]
        ids = torch.tensor([expand(prompt, video, self.visual_tokens)], device=device)
        with marking(watch, self.seams):
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=pixels, do_sample=False,
                max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=FirstToken(watch),
            )
        watch.mark(GENERATION)
        new: list[int] = found[0, ids.shape[1]:].tolist()
        return new


def expand(prompt: Sequence[int], video: int, count: int) -> list[int]:
    """A prompt as the processor writes it: a placeholder for each visual token in the place of the -200."""
    return [x for token in prompt for x in ([video] * count if token == VIDEO_TOKEN else [token])]


def share_onevision(
    vision: Vision, language: Any, prompt: Sequence[int], *, frames: int, attention: str, merge_layers: Sequence[int]
) -> OneVision:
    """transformers' model over the tensors of `vision` and `language`, with `attention` in both of its parts.

    merge_layers: where its vision time is divided. Raises EngineError for a checkpoint that it has no form for.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    if (vision.pooling, vision.newline) != ("bilinear", "one_token"):
        raise EngineError(
            f"transformers' LLaVA-OneVision pools bilinearly and ends a video with one newline, this checkpoint has "
            f"pooling {vision.pooling} and newline {vision.newline}"
        )
    geometry, text = vision.geometry, language.config
    rare = [i for i in range(text.vocab_size - 1, -1, -1) if i not in set(prompt)][:2]
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": geometry.hidden_size,
            "intermediate_size": geometry.intermediate_size, "num_hidden_layers": geometry.layers,
            "num_attention_heads": geometry.heads, "image_size": geometry.image_size,
            "patch_size": geometry.patch_size, "layer_norm_eps": geometry.layer_norm_eps,
            "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False,
        },
        text_config=text.to_dict() | {"model_type": "qwen2"}, image_token_index=rare[0], video_token_index=rare[1],
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attention)
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)  # before transformers 5.1
    ours = {(part, name): tensor for part, module in (("vision", vision), ("language", language))
            for name, tensor in module.state_dict().items()}
    for name in ("weight", "bias"):  # of the post-layernorm, which runs there and is not looked at
        ours["vision", f"siglip.post_layernorm.{name}"] = torch.full_like(
            vision.get_parameter(f"layers.0.norm1.{name}"), float(name == "weight")
        )
    model.load_state_dict({name: ours[locate(name, "transformers")] for name in model.state_dict()}, assign=True)  # type: ignore[index]
    _fill_buffers(model, tower, language)
    model.generation_config = language.generation_config
    model.eval().requires_grad_(False)
    inner = model.model
    seams = (
        *tower_seams(tower.encoder.layers, merge_layers, merges=False),
        Seam(inner, AFTER, POOLED, "apply_pooling"), Seam(inner.language_model, BEFORE, SPLICE),
        Seam(model, AFTER, PREFILL),
    )
    side = -(-geometry.grid // 2)
    return OneVision(model, frames * side**2 + 1, seams, (rare[0], rare[1]))


def _fill_buffers(model: Any, tower: Any, language: Any) -> None:
    """What no checkpoint holds, and the meta device left empty: positions, and the rotary table."""
    positions = tower.embeddings.position_ids
    tower.embeddings.position_ids = torch.arange(positions.shape[1], device=language.device)[None]
    model.model.language_model.rotary_emb = language.model.rotary_emb
    model.tie_weights()
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise EngineError(f"this version of transformers has buffers that are not known here: {', '.join(empty)}")
