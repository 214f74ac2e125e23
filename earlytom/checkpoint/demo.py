"""The built-in demo checkpoint: real geometry, small widths; its weights come with the package, or from a seed.

A frame is 384 x 384 with 729 patches, as published; SigLIP has 9 layers of which 8 are used, and Qwen2 has 7. Published
settings are scaled to that depth: `preset(depth=, llm_layers=)`. It was trained on the small world of earlytom/demo and
knows nothing else. With random weights (seed=) answers are readable words and mean nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import CheckpointError
from ..vision.geometry import VisionGeometry
from . import demo_tokenizer
from .files import read_header
from .formats import SO400M
from .keys import TABLES, Slot, key_of, locate
from .random_weights import random_weight

WEIGHTS = Path(__file__).parent.parent / "demo" / "weights.safetensors"  # float32, under the names of llava-next
TOWER = "siglip-demo-patch14-384"
VISION: dict[str, Any] = SO400M | {
    "model_type": "siglip_vision_model", "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 3,
    "num_hidden_layers": 9,
}
TEXT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
    "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": None,
}


def write_demo(directory: str | Path, *, format: str = "llava-next", seed: int | None = None) -> Path:
    """Write the demo as a checkpoint directory of either format ("llava-next", "transformers"), float32; returns it.

    Both formats hold the same weights: without a seed the trained ones that come with the package, with one random
    ones. A random tensor's values depend on the seed, its name and its shape only: they are torch.randn of a CPU
    generator seeded with the CRC-32 of "<seed>:<part>:<name>", scaled as in `random_weight`.
    Raises CheckpointError on an unknown format, trained weights that are missing or damaged, or a directory that cannot
    be written; nothing is left there then.
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


def demo_weights(seed: int | None) -> dict[Slot, Tensor]:
    """Slot (see keys.py) -> float32 tensor: all of Vision and Qwen2, and SigLIP's unused post-layernorm.

    seed: of random ones; None: the trained ones. Raises CheckpointError when those are missing or damaged.
    """
    if seed is None:
        return _trained_weights()
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from ..vision.siglip import Vision

    with torch.device("meta"):
        language = Qwen2ForCausalLM(Qwen2Config(vocab_size=demo_tokenizer.size(), **TEXT))
        shapes = {("vision", k): v.shape for k, v in Vision(demo_geometry()).state_dict().items()}
        shapes |= {("language", k): v.shape for k, v in language.state_dict().items()}
    width = VISION["hidden_size"]
    shapes |= {("vision", f"siglip.post_layernorm.{k}"): torch.Size([width]) for k in ("weight", "bias")}
    return {slot: random_weight(slot, shape, seed) for slot, shape in shapes.items()}


def _trained_weights() -> dict[Slot, Tensor]:
    if not WEIGHTS.is_file():
        raise CheckpointError(
            f"the demo's trained weights are not at {WEIGHTS}: install earlytom-export again, or write a demo with "
            "random weights by write_demo(directory, seed=0)"
        )
    slots = {key: locate(key, "llava-next") for key in read_header(WEIGHTS)}  # of a damaged file it says what is wrong
    tensors = load_file(WEIGHTS)
    return {slot: tensors[key] for key, slot in slots.items() if slot is not None}
