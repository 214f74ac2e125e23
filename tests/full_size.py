"""Names and shapes of every tensor of the published checkpoints, written out from their public configurations.

Data for tests: it shares nothing with earlytom's own tables. Sources: config.json of lmms-lab's
llava-onevision-qwen2-*-ov and LLaVA-Video-7B-Qwen2, of Qwen/Qwen2-{0.5B,7B,72B}-Instruct and of
google/siglip-so400m-patch14-384; the modules of LLaVA-NeXT and of transformers' SigLIP and Qwen2; transformers'
convert_llava_onevision_weights_to_hf.py, which adds two tokens to the vocabulary and rounds it up to a multiple of 64.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """One published checkpoint; parameters: of the LLM by Qwen2's model card, without a tied head."""

    format: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int
    tied: bool
    parameters: int | None
    newline: str = "one_token"
    pooling: str = "bilinear"
    shard_bytes: int = 5 * 10**9


PUBLISHED = {
    "lmms-lab/llava-onevision-qwen2-0.5b-ov": Published(
        "llava-next", 24, 896, 14, 2, 4864, 151936, True, 494_032_768
    ),
    "lmms-lab/llava-onevision-qwen2-7b-ov": Published(
        "llava-next", 28, 3584, 28, 4, 18944, 152064, False, 7_615_616_512
    ),
    "lmms-lab/llava-onevision-qwen2-72b-ov": Published(
        "llava-next", 80, 8192, 64, 8, 29568, 152064, False, 72_706_203_648
    ),
    "lmms-lab/LLaVA-Video-7B-Qwen2": Published(
        "llava-next", 28, 3584, 28, 4, 18944, 152064, False, 7_615_616_512, newline="grid", pooling="average"
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": Published(
        "transformers", 24, 896, 14, 2, 4864, 152000, True, None
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Published(
        "transformers", 28, 3584, 28, 4, 18944, 152128, False, None
    ),
}
SIGLIP_SO400M = 428_225_600  # parameters of the whole vision model: 27 layers, post-layernorm, pooling head

PREFIXES = {  # format -> tower, first and second projector layer, newline, LLM, head
    "llava-next": (
        "model.vision_tower.vision_tower.vision_model", "model.mm_projector.0", "model.mm_projector.2",
        "model.image_newline", "model", "lm_head",
    ),
    "transformers": (
        "vision_tower.vision_model", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2",
        "image_newline", "language_model.model", "language_model.lm_head",
    ),
}


def siglip(prefix: str, layers: int) -> Shapes:
    """so400m-patch14-384 without its pooling head."""
    shapes: Shapes = {
        f"{prefix}.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{prefix}.embeddings.patch_embedding.bias": (1152,),
        f"{prefix}.embeddings.position_embedding.weight": (729, 1152),
    }
    for i in range(layers):
        layer = f"{prefix}.encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.weight": (1152,), f"{layer}.{norm}.bias": (1152,)}
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{projection}.weight"] = (1152, 1152)
            shapes[f"{layer}.self_attn.{projection}.bias"] = (1152,)
        shapes |= {f"{layer}.mlp.fc1.weight": (4304, 1152), f"{layer}.mlp.fc1.bias": (4304,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (1152, 4304), f"{layer}.mlp.fc2.bias": (1152,)}
    return shapes | {f"{prefix}.post_layernorm.weight": (1152,), f"{prefix}.post_layernorm.bias": (1152,)}


def siglip_head(prefix: str) -> Shapes:
    """The pooling head, which LLaVA removes."""
    return {
        f"{prefix}.head.probe": (1, 1, 1152),
        f"{prefix}.head.attention.in_proj_weight": (3456, 1152),
        f"{prefix}.head.attention.in_proj_bias": (3456,),
        f"{prefix}.head.attention.out_proj.weight": (1152, 1152),
        f"{prefix}.head.attention.out_proj.bias": (1152,),
        f"{prefix}.head.layernorm.weight": (1152,),
        f"{prefix}.head.layernorm.bias": (1152,),
        f"{prefix}.head.mlp.fc1.weight": (4304, 1152),
        f"{prefix}.head.mlp.fc1.bias": (4304,),
        f"{prefix}.head.mlp.fc2.weight": (1152, 4304),
        f"{prefix}.head.mlp.fc2.bias": (1152,),
    }


def qwen2(prefix: str, head: str, size: Published) -> Shapes:
    width, mlp = size.width, size.mlp
    kv = width // size.heads * size.key_value_heads
    shapes: Shapes = {f"{prefix}.embed_tokens.weight": (size.vocabulary, width)}
    for i in range(size.layers):
        layer = f"{prefix}.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (width, width),
            f"{layer}.self_attn.q_proj.bias": (width,),
            f"{layer}.self_attn.k_proj.weight": (kv, width),
            f"{layer}.self_attn.k_proj.bias": (kv,),
            f"{layer}.self_attn.v_proj.weight": (kv, width),
            f"{layer}.self_attn.v_proj.bias": (kv,),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.gate_proj.weight": (mlp, width),
            f"{layer}.mlp.up_proj.weight": (mlp, width),
            f"{layer}.mlp.down_proj.weight": (width, mlp),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    shapes[f"{prefix}.norm.weight"] = (width,)
    return shapes if size.tied else shapes | {f"{head}.weight": (size.vocabulary, width)}


def vision_tensors(size: Published, siglip_layers: int = 26) -> Shapes:
    tower, first, second, newline, _, _ = PREFIXES[size.format]
    return {
        **siglip(tower, siglip_layers),
        f"{first}.weight": (size.width, 1152),
        f"{first}.bias": (size.width,),
        f"{second}.weight": (size.width, size.width),
        f"{second}.bias": (size.width,),
        newline: (size.width,),
    }


def language_tensors(size: Published) -> Shapes:
    return qwen2(*PREFIXES[size.format][4:], size)


def config_json(size: Published) -> dict[str, Any]:
    """config.json as published, without settings of training and image grids."""
    text = {
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
        "hidden_size": size.width, "initializer_range": 0.02, "intermediate_size": size.mlp,
        "max_position_embeddings": 32768, "max_window_layers": size.layers, "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers, "num_key_value_heads": size.key_value_heads, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": size.tied, "use_cache": True,
        "use_sliding_window": False, "vocab_size": size.vocabulary,
    }
    if size.format == "llava-next":
        return text | {
            "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava", "image_aspect_ratio": "anyres_max_9",
            "image_token_index": 151646, "mm_hidden_size": 1152, "mm_newline_position": size.newline,
            "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
            "mm_spatial_pool_mode": size.pooling, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
            "mm_vision_tower": "google/siglip-so400m-patch14-384", "rope_scaling": None, "torch_dtype": "bfloat16",
        }
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
        "image_token_index": 151646, "video_token_index": 151647, "projector_hidden_act": "gelu",
        "text_config": text | {"model_type": "qwen2"}, "tie_word_embeddings": size.tied, "torch_dtype": "float16",
        "use_image_newline_parameter": True, "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": {
            "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
        },
    }


def write_sparse(path: Path, shapes: Shapes) -> None:
    """A safetensors file of bfloat16 zeros that takes no room on disk: its data is a hole."""
    header, end = {}, 0
    for key, shape in shapes.items():
        count = 1
        for extent in shape:
            count *= extent
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end := end + 2 * count]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_checkpoint(directory: Path, size: Published, shapes: Shapes | None = None) -> dict[str, str]:
    """The published checkpoint as a directory of sparse shards with their index; returns tensor -> file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(size)))
    shards: list[Shapes] = [{}]
    filled = 0
    for key, shape in (shapes or {**language_tensors(size), **vision_tensors(size)}).items():
        count = 2
        for extent in shape:
            count *= extent
        if filled + count > size.shard_bytes and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][key] = shape
        filled += count
    if len(shards) == 1:
        write_sparse(directory / "model.safetensors", shards[0])
        return dict.fromkeys(shards[0], "model.safetensors")
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        write_sparse(directory / name, shard)
    where = {key: name for name, shard in zip(names, shards) for key in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where
