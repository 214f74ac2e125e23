"""Whole models in published shapes with random weights: how fast a model is does not depend on what it knows.

Nothing is read or fetched. A weight depends on the seed and its name (see random_weights.py), so every process that
makes a model of one size makes the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

from ..errors import ConfigError
from ..language.geometry import PUBLISHED, LanguageGeometry
from ..vision.geometry import VisionGeometry
from . import demo_tokenizer
from .identity import CheckpointIdentity
from .loader import Model, best_attention
from .modules import finish
from .random_weights import fill, random_vision


@dataclass(frozen=True)
class Size:
    """Shapes of one LLaVA-OneVision: its tower and projector, and its Qwen2."""

    vision: VisionGeometry
    language: LanguageGeometry


def _published(width: int) -> Size:
    return Size(replace(VisionGeometry(), projector_size=width), PUBLISHED[width])


SIZES = {"0.5b": _published(896), "7b": _published(3584)}
# For tests: everything that a full size goes through, in no time.
TINY = Size(
    VisionGeometry(84, 14, 32, 2, 48, 4, projector_size=32),
    LanguageGeometry(4, 32, 4, 2, 8, 48, demo_tokenizer.size(), tied=True),
)


def random_model(
    size: str, *, dtype: torch.dtype = torch.float32, language_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu", parts: tuple[str, ...] = ("vision", "language"), seed: int = 0,
) -> Model:
    """A LLaVA-OneVision "0.5b" or "7b" with random weights, as `load` gives one; its tokenizer is the demo's.

    language_dtype: of Qwen2, `dtype` when not given. Raises ConfigError for another size.
    """
    from ..language.qwen2 import Qwen2
    from ..language.versions import qwen2_config

    shapes = TINY if size == "tiny" else SIZES.get(size)
    if shapes is None:
        raise ConfigError(f"there is no full size {size!r}, it must be one of {', '.join(SIZES)}")
    identity = CheckpointIdentity(
        name=f"random {size}", format="random", digest=hashlib.sha256(f"{size}:{seed}".encode()).hexdigest(),
        geometry=shapes.vision, pooling="bilinear", newline="one_token", language_layers=shapes.language.layers,
        language=shapes.language,
    )
    vision = random_vision(shapes.vision, device, seed, dtype) if "vision" in parts else None
    if "language" not in parts:
        return Model(vision, None, None, identity, ())
    special, language_dtype = demo_tokenizer.special_ids(), language_dtype or dtype
    sizes = shapes.language
    config = qwen2_config({
        "vocab_size": sizes.vocabulary, "hidden_size": sizes.hidden_size, "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": sizes.tied, "eos_token_id": special[demo_tokenizer.EOS],
    })
    config._attn_implementation = best_attention(torch.device(device), language_dtype)
    with torch.device("meta"):
        language = Qwen2(config)
    fill(language, "language", device, seed, language_dtype)
    finish(language, torch.device(device), (special[demo_tokenizer.EOS], special[demo_tokenizer.PAD]))
    ends = tuple(language.generation_config.eos_token_id)
    return Model(vision, language, demo_tokenizer.make_tokenizer(), identity, ends)
