"""What the tests of checkpoints share: changes to a directory, a watch on what is read, a small transformers model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import earlytom.checkpoint.tensors
from tests.full_size import Published, config_json

INDEX = "model.safetensors.index.json"
TOWER = "model.vision_tower.vision_tower.vision_model"


def guard(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Names of the files that safe_open is called on, and of the tensors that are read from them."""
    opened: list[str] = []
    read: list[str] = []
    real = earlytom.checkpoint.tensors.safe_open

    class Guarded:
        def __init__(self, path: Path, **kwargs: Any) -> None:
            opened.append(Path(path).name)
            self.file = real(path, **kwargs)

        def __enter__(self) -> Guarded:
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def get_tensor(self, key: str) -> Tensor:
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(earlytom.checkpoint.tensors, "safe_open", Guarded)
    return opened, read


def shard(directory: Path, number: int) -> dict[str, str]:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    keys = sorted(tensors)
    where = {key: f"model-{i * number // len(keys) + 1:05}-of-{number:05}.safetensors" for i, key in enumerate(keys)}
    for file in set(where.values()):
        save_file({key: tensors[key] for key in keys if where[key] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": where}))
    return where


def write_json(directory: Path, changes: dict[str, Any], size_of: Published | None = None) -> None:
    """Change config.json; a value of `...` removes a setting."""
    path = directory / "config.json"
    config = (config_json(size_of) if size_of else json.loads(path.read_text())) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def small_llava(*, layers: int = 3, feature_layer: int = -1, tied: bool = False) -> Any:
    """A random transformers LlavaOnevision with 4 x 4 patches."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, image_size=56,
        patch_size=14, vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=[1, 2],
    )
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=30, video_token_index=31,
        vision_feature_layer=feature_layer,
    )
    return LlavaOnevisionForConditionalGeneration(config).eval()


def hub_name(name: str) -> str:
    """A module's name since transformers 4.52 -> the name in the files on the hub."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(new):
            return old + name[len(new) :]
    raise AssertionError(name)
