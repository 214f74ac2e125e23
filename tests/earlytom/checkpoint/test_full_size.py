"""Names and shapes of the published checkpoints, at full size: nothing missing, nothing left, nothing read in vain."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from earlytom.checkpoint import load
from earlytom.checkpoint.keys import TABLES, key_of, locate
from earlytom.errors import CheckpointError
from tests.checkpoints import TOWER, guard
from tests.full_size import (
    PUBLISHED,
    SIGLIP_SO400M,
    Shapes,
    language_tensors,
    siglip,
    siglip_head,
    vision_tensors,
    write_checkpoint,
)


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_written_out_shapes_have_the_published_number_of_parameters(name: str) -> None:
    size = PUBLISHED[name]
    language = language_tensors(size)
    if size.parameters:
        assert count(language) == size.parameters
    assert count(siglip("v", 27) | siglip_head("v")) == SIGLIP_SO400M


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_checkpoint_fits(tmp_path: Path, name: str) -> None:
    """Every name and shape of the published files, through real headers: each parameter once, nothing left."""
    size = PUBLISHED[name]
    where = write_checkpoint(tmp_path, size)
    model = load(tmp_path, device="meta", dtype=torch.float16)
    assert model.vision is not None and model.language is not None
    modules = (("vision", model.vision), ("language", model.language))
    parameters = {(part, key): p for part, module in modules for key, p in module.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.float16 for p in parameters.values())
    slots = Counter(slot for key in where if (slot := locate(key, size.format)) in parameters)
    assert slots == Counter(parameters.keys())
    unused = {key for key in where if locate(key, size.format) not in parameters}
    assert unused == {key for key in where if ".post_layernorm." in key} and len(unused) == 2
    assert sum(p.numel() for p in model.language.parameters()) == count(language_tensors(size))
    geometry = model.geometry
    assert (geometry.hidden_size, geometry.heads, geometry.layers, geometry.patches) == (1152, 16, 26, 729)
    assert (geometry.intermediate_size, geometry.projector_size) == (4304, size.width)
    assert (model.vision.pooling, model.vision.newline) == (size.pooling, size.newline)
    config = model.language.config
    assert config.rope_parameters["rope_theta"] == 1e6 and config.sliding_window is None
    assert config.tie_word_embeddings == size.tied and model.eos_token_ids == (151645,)
    assert set(config.layer_types) == {"full_attention"}


@pytest.mark.parametrize("format", TABLES)
def test_written_names_are_read_back(format: str) -> None:
    size = next(s for s in PUBLISHED.values() if s.format == format and not s.tied)
    for key in (*vision_tensors(size), *language_tensors(size)):
        slot = locate(key, format)
        assert slot is not None and key_of(slot, format) == key


@pytest.mark.parametrize("extra", ["last layer", "head", "position_ids", "inv_freq", "tied head"])
def test_tensors_that_are_rightly_unused(tmp_path: Path, extra: str) -> None:
    size = PUBLISHED["lmms-lab/llava-onevision-qwen2-0.5b-ov"]
    choices: dict[str, Shapes] = {
        "last layer": vision_tensors(size, siglip_layers=27),
        "head": siglip_head(TOWER),
        "position_ids": {f"{TOWER}.embeddings.position_ids": (1, 729)},
        "inv_freq": {"model.layers.0.self_attn.rotary_emb.inv_freq": (32,)},
        "tied head": {"lm_head.weight": (151936, 896)},
    }
    more = choices[extra]
    write_checkpoint(tmp_path, size, {**language_tensors(size), **vision_tensors(size), **more})
    assert load(tmp_path, device="meta").language is not None


def test_a_28th_layer_is_unexpected(tmp_path: Path) -> None:
    size = PUBLISHED["lmms-lab/llava-onevision-qwen2-0.5b-ov"]
    write_checkpoint(tmp_path, size, vision_tensors(size, siglip_layers=28))
    with pytest.raises(CheckpointError, match=r"16 unexpected \(model.*layers\.27\.layer_norm1\.weight"):
        load(tmp_path, device="meta", parts=("vision",))


def test_vision_of_7b_touches_no_language_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real reading (of holes): files without a vision tensor are never opened, here they do not even exist."""
    size = PUBLISHED["lmms-lab/llava-onevision-qwen2-7b-ov"]
    where = write_checkpoint(tmp_path, size)
    whole = load(tmp_path, device="meta").identity
    vision = vision_tensors(size)
    mixed = {file for key, file in where.items() if key in vision}
    assert len(set(where.values())) >= 3 and len(mixed) < len(set(where.values()))
    for file in set(where.values()) - mixed:
        (tmp_path / file).unlink()
    opened, read = guard(monkeypatch)
    model = load(tmp_path, dtype=torch.bfloat16, parts=("vision",))
    assert model.language is None and model.tokenizer is None and model.identity == whole
    assert set(opened) == mixed
    assert set(read) == {key for key in vision if "post_layernorm" not in key} and len(read) == len(set(read))
    assert model.vision is not None and not any(p.is_meta or p.any() for p in model.vision.parameters())
