"""The built-in demo checkpoint: real geometry, small widths, random weights from a seed. Made in place, in a second.

A frame is 384 x 384 with 729 patches, SigLIP has 27 layers of which 26 are used and Qwen2 has 24, so every published
setting (merge layers 8,21,23, inner merging before layer 18) is valid. Answers are readable words and mean nothing.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..vision.geometry import VisionGeometry
from . import demo_tokenizer
from .formats import SO400M
from .keys import TABLES, key_of

TOWER = "siglip-demo-patch14-384"
VISION: dict[str, Any] = SO400M | {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
    "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": None,
}  # fmt: skip
# Ends of names -> standard deviation of a weight, in units of fan-in ** -0.5 (elsewhere 1): attention that is far from
# uniform, residual branches that neither drown the stream nor vanish in it.
GAINS = {
    "q_proj.weight": 1.5, "k_proj.weight": 1.5, "out_proj.weight": 0.3, "o_proj.weight": 0.5, "fc2.weight": 0.5,
}  # fmt: skip


def write_demo(directory: str | Path, *, format: str = "llava-next", seed: int = 0) -> Path:
    """Write the demo as a checkpoint directory of either format ("llava-next", "transformers"), float32; returns it.

    Both formats hold the same weights. A tensor's values depend on the seed, its name and its shape only: they are
    torch.randn of a CPU generator seeded with the CRC-32 of "<seed>:<part>:<name>", scaled as in `_value`.
    Raises CheckpointError on an unknown format or a directory that cannot be written.
    """
    if format not in TABLES:
        raise CheckpointError(f"there is no checkpoint format {format!r}, the formats are {' and '.join(TABLES)}")
    directory = Path(directory)
    tensors = {key_of(slot, format): tensor for slot, tensor in demo_weights(seed).items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in _configs(format).items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        demo_tokenizer.write_tokenizer(directory)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except OSError as error:
        raise CheckpointError(f"the demo cannot be written to {directory}: {error.strerror or error}") from None
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


def demo_weights(seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """Slot (see keys.py) -> float32 tensor: all of Vision and Qwen2, and SigLIP's unused post-layernorm."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from ..vision.siglip import Vision

    with torch.device("meta"):
        language = Qwen2ForCausalLM(Qwen2Config(vocab_size=demo_tokenizer.size(), **TEXT))
        shapes = {("vision", k): v.shape for k, v in Vision(demo_geometry()).state_dict().items()}
        shapes |= {("language", k): v.shape for k, v in language.state_dict().items()}
    width = VISION["hidden_size"]
    shapes |= {("vision", f"siglip.post_layernorm.{k}"): torch.Size([width]) for k in ("weight", "bias")}
    return {slot: _value(slot, shape, seed) for slot, shape in shapes.items()}


def _value(slot: tuple[str, str], shape: torch.Size, seed: int) -> Tensor:
    """The random tensor of a slot, scaled so that nothing collapses."""
    part, name = slot
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{part}:{name}".encode()))
    random = torch.randn(shape, generator=generator)
    kind = name.rsplit(".", 1)[-1]
    if "norm" in name:
        return 1 + 0.1 * random if kind == "weight" else 0.02 * random
    if kind == "bias":
        return 0.02 * random
    if name == "position_embedding":  # below the patches' own content, so that unlike frames stay unlike
        return 0.5 * random
    if name in ("model.embed_tokens.weight", "image_newline"):
        return random
    scale = torch.tensor(next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0))
    if name == "lm_head.weight":  # words are said, bytes and pieces of words hardly ever
        scale = torch.full((shape[0], 1), 0.3)
        scale[demo_tokenizer.readable_ids()] = 3.0
    return scale * random * random[0].numel() ** -0.5
