"""Checkpoints read for real: the golden tiny one, the demo in shards, transformers' own files, and configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from earlytom.checkpoint import Model, best_attention, load
from earlytom.checkpoint.demo import write_demo
from earlytom.checkpoint.demo_tokenizer import special_ids, vocabulary
from earlytom.errors import CheckpointError, InputError
from earlytom.language.geometry import LanguageGeometry
from earlytom.language.prompt import embed_prompt
from tests.checkpoints import TOWER, guard, hub_name, shard, small_llava, write_json
from tests.full_size import PUBLISHED

TINY = "e2e/tiny-llava-onevision"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo in LLaVA-NeXT's format, to be changed."""
    return write_demo(tmp_path / "demo", seed=0)


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Model:
    return load(golden / TINY)


def test_golden_checkpoint(tiny: Model, golden: Path) -> None:
    raw = load_file(golden / TINY / "model.safetensors")
    assert tiny.vision is not None and tiny.language is not None and tiny.tokenizer is None
    assert tiny.eos_token_ids == () and tiny.identity.format == "llava-next"
    assert (tiny.geometry.layers, tiny.geometry.hidden_size, tiny.geometry.heads) == (6, 48, 4)
    vision = dict(tiny.vision.named_parameters())
    layer = f"{TOWER}.encoder.layers.5"
    for name, key in {
        "patch_embedding.weight": f"{TOWER}.embeddings.patch_embedding.weight",
        "position_embedding": f"{TOWER}.embeddings.position_embedding.weight",
        "layers.5.norm1.weight": f"{layer}.layer_norm1.weight",
        "layers.5.norm2.bias": f"{layer}.layer_norm2.bias",
        "layers.5.attention.q_proj.weight": f"{layer}.self_attn.q_proj.weight",
        "layers.5.attention.out_proj.bias": f"{layer}.self_attn.out_proj.bias",
        "layers.5.fc2.weight": f"{layer}.mlp.fc2.weight",
        "linear_1.weight": "model.mm_projector.0.weight",
        "linear_2.bias": "model.mm_projector.2.bias",
        "image_newline": "model.image_newline",
    }.items():
        assert torch.equal(vision[name], raw[key])
    for name, parameter in tiny.language.named_parameters():
        assert torch.equal(parameter, raw[name]) and not parameter.requires_grad
    assert len(vision) + len(dict(tiny.language.named_parameters())) == len(raw) - 2  # the post-layernorm


@pytest.mark.parametrize("case", [0, 1, 2])
@torch.no_grad()
def test_golden_logits(tiny: Model, golden: Path, case: int) -> None:
    with np.load(golden / "e2e" / "e2e.npz") as archive:
        visual = torch.from_numpy(archive[f"{case}_visual"])
        expected = torch.from_numpy(archive[f"{case}_first_logits"])
        ids = json.loads(str(archive["meta"]))[case]["prompt"]
    assert tiny.language is not None
    embeds, _ = embed_prompt(tiny.language, ids, visual)
    logits = tiny.language(inputs_embeds=embeds, logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_parts(golden: Path, tiny: Model, dtype: torch.dtype) -> None:
    vision = load(golden / TINY, dtype=dtype, parts=("vision",))
    language = load(golden / TINY, dtype=dtype, parts=["language"])
    assert vision.language is None and language.vision is None
    assert vision.identity == language.identity == tiny.identity
    for mine, theirs in ((vision.vision, tiny.vision), (language.language, tiny.language)):
        assert mine is not None and theirs is not None
        for name, parameter in mine.state_dict().items():
            assert parameter.dtype == dtype and torch.equal(parameter, theirs.state_dict()[name].to(dtype))


def test_language_alone_reads_no_vision_tensor(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, read = guard(monkeypatch)
    load(golden / TINY, parts=("language",))
    assert read and not any("vision" in key or "projector" in key or "newline" in key for key in read)


def test_buffers_no_checkpoint_holds_are_right(tiny: Model) -> None:
    from transformers import Qwen2ForCausalLM

    assert tiny.language is not None
    expected = dict(Qwen2ForCausalLM(tiny.language.config).named_buffers())
    buffers = dict(tiny.language.named_buffers())
    assert buffers.keys() == expected.keys() and expected
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)
    assert not any(p.is_meta for p in tiny.language.parameters())


def test_attention_implementation(golden: Path) -> None:
    model = load(golden / TINY, parts=("language",), attn_implementation="eager", device="meta")
    assert model.language is not None and model.language.config._attn_implementation == "eager"
    with pytest.raises(InputError, match="attn_implementation 'nonsense'"):
        load(golden / TINY, attn_implementation="nonsense", device="meta")


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    """The demo in four shards: the same model and the same identity as in one file."""
    one, many = write_demo(tmp_path / "one", seed=0), write_demo(tmp_path / "many", seed=0)
    shard(many, 4)
    first, second = load(one), load(many)
    assert first.identity.digest == second.identity.digest
    for a, b in ((first.vision, second.vision), (first.language, second.language)):
        assert a is not None and b is not None
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["hub", "modules", "save_pretrained"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_of_transformers_files(tmp_path: Path, layout: str, tied: bool) -> None:
    theirs = small_llava(tied=tied)
    theirs.save_pretrained(tmp_path)
    if layout != "save_pretrained":
        state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
        if tied:
            del state["lm_head.weight"]
        rename: Callable[[str], str] = hub_name if layout == "hub" else str
        save_file({rename(name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    ours = load(tmp_path)
    assert ours.vision is not None and ours.language is not None and ours.eos_token_ids == (1, 2)
    assert (ours.language.lm_head.weight is ours.language.model.embed_tokens.weight) == tied

    frames = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8)
    pixels = ((frames.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    ids = torch.tensor([[3, 4, *[31] * (2 * 4 + 1), 5, 6]])
    expected = theirs(input_ids=ids, pixel_values_videos=pixels[None]).logits
    embed = ours.language.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor([3, 4])), ours.vision.encode_all(frames), embed(torch.tensor([5, 6]))])
    torch.testing.assert_close(ours.language(inputs_embeds=embeds[None]).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "feature_layer", "used"),
    [(3, -1, 3), (3, 3, 3), (4, -2, 3), (4, 3, 3), (4, 4, 4), (4, 1, 1), (4, -4, 1)],
)
def test_the_feature_is_taken_where_transformers_takes_it(
    tmp_path: Path, layers: int, feature_layer: int, used: int
) -> None:
    """hidden_states[i] is the output of layer i - 1, and the last one has not been through the post-layernorm."""
    theirs = small_llava(layers=layers, feature_layer=feature_layer)
    theirs.model.vision_tower.post_layernorm.weight.fill_(3)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, parts=("vision",))
    assert ours.vision is not None and len(ours.vision.layers) == ours.geometry.layers == used
    frames = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8)
    pixels = ((frames.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    hidden = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours.vision.encode(frames), hidden[feature_layer], rtol=0, atol=1e-5)
    features = theirs.model.get_video_features(pixels[None]).pooler_output[0]
    torch.testing.assert_close(ours.vision.encode_all(frames), features, rtol=0, atol=1e-5)


@torch.no_grad()
def test_llava_next_takes_the_feature_before_the_last_layer(tmp_path: Path) -> None:
    """A whole SigLIP in LLaVA-NeXT's format, as transformers 5 names it: the last but one layer's output is used."""
    from transformers import SiglipVisionModel

    theirs = small_llava(layers=4, feature_layer=-2)
    tower = SiglipVisionModel(theirs.config.vision_config).eval()
    state = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    for name, tensor in theirs.model.multi_modal_projector.state_dict().items():
        state[f"model.mm_projector.{name.replace('linear_1', '0').replace('linear_2', '2')}"] = tensor
    state["model.image_newline"] = theirs.model.image_newline.detach()
    save_file(state, tmp_path / "model.safetensors")
    size = PUBLISHED["lmms-lab/llava-onevision-qwen2-0.5b-ov"]
    write_json(tmp_path, {"hidden_size": 16, "mm_vision_tower": "tower"}, size_of=size)
    (tmp_path / "tower").mkdir()
    theirs.config.vision_config.save_pretrained(tmp_path / "tower")
    ours = load(tmp_path, parts=("vision",))
    assert ours.vision is not None and ours.geometry.layers == 3
    frames = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8)
    pixels = ((frames.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours.vision.encode(frames), hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "pooling", "newline"),
    [
        ({}, "bilinear", "one_token"),
        ({"mm_spatial_pool_mode": ..., "mm_newline_position": ...}, "bilinear", "one_token"),
        ({"mm_spatial_pool_mode": None, "mm_spatial_pool_stride": None}, "bilinear", "one_token"),
        ({"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}, "average", "grid"),
        ({"mm_spatial_pool_mode": "max", "mm_newline_position": "no_token"}, "max", "no_token"),
        ({"mm_patch_merge_type": "spatial"}, "bilinear", "no_token"),  # no newline embedding to append
        ({"mm_patch_merge_type": "flat", "mm_newline_position": "grid"}, "bilinear", "no_token"),
    ],
)
def test_pooling_and_newlines(demo: Path, changes: dict[str, Any], pooling: str, newline: str) -> None:
    write_json(demo, changes)
    model = load(demo, parts=("vision",), device="meta")
    assert model.vision is not None
    assert (model.vision.pooling, model.vision.newline) == (pooling, newline)
    assert (model.identity.pooling, model.identity.newline) == (pooling, newline)


@pytest.mark.parametrize("name", ["vocab_size", "num_key_value_heads"])
def test_the_identity_knows_the_llms_sizes_where_the_configuration_tells_them(demo: Path, name: str) -> None:
    known = load(demo, parts=("vision",), device="meta").identity.language
    config = json.loads((demo / "config.json").read_text())
    assert known == LanguageGeometry(
        config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"],
        config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"],
        config["intermediate_size"], config["vocab_size"], config["tie_word_embeddings"],
    )
    write_json(demo, {name: ...})
    silent = load(demo, parts=("vision",), device="meta").identity
    assert silent.language is None and silent.language_layers == config["num_hidden_layers"]


def test_without_newline_embedding(demo: Path) -> None:
    tensors = load_file(demo / "model.safetensors")
    del tensors["model.image_newline"]
    save_file(tensors, demo / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(model.image_newline\)"):
        load(demo, parts=("vision",))
    write_json(demo, {"mm_patch_merge_type": "spatial"})
    model = load(demo, parts=("vision",))
    assert model.vision is not None and not model.vision.image_newline.any()


def test_vocabulary_that_the_configuration_does_not_tell(demo: Path) -> None:
    write_json(demo, {"vocab_size": ...})
    model = load(demo, parts=("language",))
    assert model.language is not None and model.language.config.vocab_size == len(model.tokenizer)


@pytest.mark.parametrize("name", ["google/siglip-so400m-patch14-384", "/data/models/siglip-so400m-patch14-384"])
def test_known_tower_needs_no_download(demo: Path, name: str) -> None:
    write_json(demo, {"mm_vision_tower": name})
    with pytest.raises(CheckpointError, match=r"misshapen .*patch_embedding.weight is \[96, 3, 14, 14\], not \[1152"):
        load(demo, parts=("vision",))


def test_long_rope_settings_of_either_age(demo: Path) -> None:
    write_json(demo, {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}})
    old = load(demo, parts=("language",))
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    write_json(demo, {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": parameters})
    new = load(demo, parts=("language",))
    assert old.language is not None and new.language is not None
    assert old.language.config.rope_parameters == new.language.config.rope_parameters == parameters
    assert torch.equal(old.language.model.rotary_emb.inv_freq, new.language.model.rotary_emb.inv_freq)


def test_tokenizer_in_the_files_llava_next_publishes(demo: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json, and the model type "llava", which is another model's."""
    expected = load(demo, parts=("language",)).tokenizer
    (demo / "tokenizer.json").unlink()
    tokens, merges = vocabulary()
    (demo / "vocab.json").write_text(json.dumps(tokens))
    (demo / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = json.loads((demo / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(i): {"content": token, "normalized": False, "special": True} for token, i in special_ids().items()
    }
    (demo / "tokenizer_config.json").write_text(json.dumps(settings))
    write_json(demo, {"model_type": "llava"})
    tokenizer = load(demo, parts=("language",)).tokenizer
    text = "<|im_start|>user\n a man runs 12 mètres.<|im_end|>\n"
    assert tokenizer(text).input_ids == expected(text).input_ids and tokenizer.decode(tokenizer(text).input_ids) == text


def test_flash_attention_is_taken_where_it_is_installed_and_fits(monkeypatch):
    import transformers.utils

    for installed in (True, False):
        monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda installed=installed: installed)
        cuda = best_attention(torch.device("cuda", 0), torch.bfloat16)
        assert cuda == ("flash_attention_2" if installed else "sdpa")
        assert best_attention(torch.device("cuda"), torch.float32) == "sdpa", "it has no float32"
        assert best_attention(torch.device("cpu"), torch.float16) == "sdpa"
