"""The built-in demo checkpoint: real geometry, small widths, random weights from a seed. Made in place, in a second.

A frame is 384 x 384 with 729 patches, SigLIP has 27 layers of which 26 are used and Qwen2 has 24, so every published
setting (merge layers 8,21,23, inner merging before layer 18) is valid. Answers are readable words and mean nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError
from ..vision.geometry import VisionGeometry
from . import demo_tokenizer
from .formats import SO400M
from .keys import TABLES, Slot, key_of
from .random_weights import random_weight

TOWER = "siglip-demo-patch14-384"
VISION: dict[str, Any] = SO400M | {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2
}
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
    "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": None,
}


def write_demo(directory: str | Path, *, format: str = "llava-next", seed: int = 0) -> Path:
    """Write the demo as a checkpoint directory of either format ("llava-next", "transformers"), float32; returns it.

    Both formats hold the same weights. A tensor's values depend on the seed, its name and its shape only: they are
    torch.randn of a CPU generator seeded with the CRC-32 of "<seed>:<part>:<name>", scaled as in `random_weight`.
    Raises CheckpointError on an unknown format or a directory that cannot be written; nothing is left there then.
    """
    if format not in TABLES:
        raise CheckpointError(f"there is no checkpoint format {format!r}, the formats are {' and '.join(TABLES)}")
    directory = Path(directory)
    texts = {name: json.dumps(content, indent=2, sort_keys=True) + "\n" for name, content in _configs(format).items()}
    files = {name: text.encode() for name, text in (texts | demo_tokenizer.tokenizer_files()).items()}
    tensors = {key_of(slot, format): tensor for slot, tensor in demo_weights(seed).items()}
    files["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    made: list[Path] = []
    try:
        for path, content in ((directory / name, content) for name, content in files.items()):
            made += [*(parent for parent in reversed(path.parents) if not parent.exists()), path]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        size = sum(map(len, files.values())) / 1e6
        reason = error.strerror or error
        raise CheckpointError(f"the demo, {size:.0f} MB, cannot be written to {directory}: {reason}") from None
    return directory


def demo_geometry() -> VisionGeometry:
    return VisionGeometry(
        hidden_size=VISION["hidden_size"],
        heads=VISION["num_attention_heads"],
        intermediate_size=VISION["intermediate_size"],
        layers=VISION["num_hidden_layers"] - 1,
        projector_size=TEXT["hidden_size"],
    )


def _configs(format: str) -> dict[str, dict[str, Any]]:
    """File name -> JSON of a checkpoint directory, the tokenizer's apart."""
    ids = demo_tokenizer.special_ids()
    eos, pad = ids[demo_tokenizer.EOS], ids[demo_tokenizer.PAD]
    text = TEXT | {"vocab_size": demo_tokenizer.size(), "eos_token_id": eos}
    files: dict[str, dict[str, Any]] = {
        "generation_config.json": {"eos_token_id": [eos, pad], "pad_token_id": pad, "do_sample": False}
    }
    if format == "llava-next":
        files["config.json"] = text | {
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": "llava_qwen",
            "mm_hidden_size": VISION["hidden_size"],
            "mm_newline_position": "one_token",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_spatial_pool_mode": "bilinear",
            "mm_spatial_pool_stride": 2,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": TOWER,
            "torch_dtype": "float32",
        }
        files[f"{TOWER}/config.json"] = VISION
    else:
        files["config.json"] = {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "image_token_index": ids["<image>"],
            "video_token_index": ids["<video>"],
            "projector_hidden_act": "gelu",
            "text_config": text | {"model_type": "qwen2"},
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "vision_config": VISION | {"num_hidden_layers": VISION["num_hidden_layers"] - 1, "vision_use_head": False},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }
    return files


def demo_weights(seed: int = 0) -> dict[Slot, Tensor]:
    """Slot (see keys.py) -> float32 tensor: all of Vision and Qwen2, and SigLIP's unused post-layernorm."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from ..vision.siglip import Vision

    with torch.device("meta"):
        language = Qwen2ForCausalLM(Qwen2Config(vocab_size=demo_tokenizer.size(), **TEXT))
        shapes = {("vision", k): v.shape for k, v in Vision(demo_geometry()).state_dict().items()}
        shapes |= {("language", k): v.shape for k, v in language.state_dict().items()}
    width = VISION["hidden_size"]
    shapes |= {("vision", f"siglip.post_layernorm.{k}"): torch.Size([width]) for k in ("weight", "bias")}
    return {slot: random_weight(slot, shape, seed) for slot, shape in shapes.items()}
