"""What a checkpoint can be that cannot be loaded, and the one sentence that says so; the hub without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from earlytom.checkpoint import load
from earlytom.checkpoint.demo import write_demo
from earlytom.checkpoint.keys import locate
from earlytom.errors import CheckpointError, InputError
from tests.checkpoints import INDEX, TOWER, shard, write_json


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo in LLaVA-NeXT's format, to be changed."""
    return write_demo(tmp_path / "demo", seed=0)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in both formats, to be copied."""
    made = tmp_path_factory.mktemp("demos")
    for format in ("llava-next", "transformers"):
        write_demo(made / format, format=format, seed=0)
    return made


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("llava-next", {"architectures": ["LlavaLlamaForCausalLM"]}, "holds a LlavaLlamaForCausalLM; what can be"),
        ("llava-next", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "holds a LlamaForCausalLM"),
        ("llava-next", {"architectures": ..., "model_type": ...}, "holds a None"),
        ("llava-next", {"mm_spatial_pool_mode": "median"}, "mm_spatial_pool_mode is 'median'.*'bilinear', 'average'"),
        ("llava-next", {"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride is 4"),
        ("llava-next", {"mm_newline_position": "frame"}, "mm_newline_position is 'frame'"),
        ("llava-next", {"mm_newline_position": "grid", "mm_patch_merge_type": "spatial"}, "no newline embedding"),
        ("llava-next", {"mm_patch_merge_type": "pyramid"}, "mm_patch_merge_type is 'pyramid'"),
        ("llava-next", {"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ("llava-next", {"mm_vision_select_layer": -1}, "mm_vision_select_layer is -1"),
        ("llava-next", {"add_faster_video": True}, "add_faster_video is True"),
        ("llava-next", {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "vision tower 'openai/clip"),
        ("llava-next", {"mm_vision_tower": ...}, "names no vision tower"),
        ("llava-next", {"hidden_size": ...}, "hidden_size is None"),
        ("llava-next", {"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ("llava-next", {"hidden_act": 3}, "does not describe a Qwen2"),
        ("llava-next", {"hidden_act": "relish"}, "does not describe a Qwen2: KeyError: 'relish'"),
        ("llava-next", {"hidden_size": 10**12}, "hidden_size is 1000000000000, it must be a whole number from 1"),
        ("llava-next", {"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648.* from 1 to 1024"),
        ("llava-next", {"num_attention_heads": 2**20}, "does not describe a Qwen2: ZeroDivisionError"),
        ("llava-next", {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ("llava-next", {"vocab_size": 2**63}, "vocab_size is 9223372036854775808"),
        ("llava-next", {"vocab_size": -5}, "vocab_size is -5"),
        ("llava-next", {"rope_theta": "1e6"}, "rope_theta is '1e6', it must be a number above 0"),
        ("llava-next", {"rope_scaling": "linear"}, "the rotary embedding is given as 'linear'"),
        ("llava-next", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("transformers", {"vision_config": {"layer_norm_eps": float("inf")}}, "layer_norm_eps is inf"),
        ("transformers", {"vision_config": {"layer_norm_eps": [1e-6]}}, r"layer_norm_eps is \[1e-06\]"),
        ("transformers", {"vision_config": {"image_size": 2**40}}, "image_size is 1099511627776"),
        ("transformers", {"vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ("transformers", {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]"),
        ("transformers", {"vision_feature_layer": 9}, r"vision_feature_layer is 9.*1\.\.8"),
        ("transformers", {"vision_feature_layer": 0}, "vision_feature_layer is 0"),
        ("transformers", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
        ("transformers", {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ("transformers", {"text_config": {"model_type": "llama"}}, "text_config describes a llama"),
        ("transformers", {"vision_config": ...}, "has no vision_config"),
        ("transformers", {"vision_config": {"model_type": "clip_vision_model"}}, "describes a clip_vision_model"),
    ],
)
def test_configurations_that_are_refused(
    demos: Path, tmp_path: Path, format: str, changes: dict[str, Any], message: str
) -> None:
    demo = Path(shutil.copytree(demos / format, tmp_path / "demo"))
    write_json(demo, changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(demo, device="meta")
    assert "\n" not in str(caught.value)


def test_all_complaints_in_one_error(demo: Path) -> None:
    """Missing, unexpected (twice there, too), misshapen and unreadable tensors are listed together."""
    tensors = load_file(demo / "model.safetensors")
    del tensors["model.norm.weight"], tensors[f"{TOWER}.encoder.layers.3.mlp.fc1.bias"]
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(2)
    tensors["model.vision_tower.vision_tower.embeddings.patch_embedding.bias"] = torch.zeros(96)
    tensors["foo.bar"] = torch.zeros(2)
    tensors["model.mm_projector.0.weight"] = torch.zeros(128, 95)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, demo / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(demo)
    message = str(caught.value)
    assert "\n" not in message
    for text in (
        f"2 missing ({TOWER}.encoder.layers.3.mlp.fc1.bias, model.norm.weight)",
        "3 unexpected (",
        "foo.bar",
        "model.layers.0.mlp.gate.weight",
        f"{TOWER}.embeddings.patch_embedding.bias beside model.vision_tower.vision_tower.embeddings",
        "1 misshapen (model.mm_projector.0.weight is [128, 95], not [128, 96])",
        "dtype other than BF16, F16, F32, F64 (lm_head.weight is I8)",
    ):
        assert text in message
    with pytest.raises(CheckpointError) as caught:
        load(demo, parts=("vision",))
    assert "norm.weight" not in str(caught.value) and "lm_head" not in str(caught.value)
    assert "foo.bar" in str(caught.value) and "fc1.bias" in str(caught.value)


def test_hundreds_of_complaints_are_summed_up(demo: Path) -> None:
    write_json(demo, {"num_hidden_layers": 7 + 16})
    pattern = r"192 missing \(model\.layers\.\*\.self_attn\.q_proj\.weight x 16, "
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load(demo, device="meta")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("size", [0, 5, 100, 100_000])
def test_truncated_file(demo: Path, size: int) -> None:
    with (demo / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (damaged|not a safetensors file)") as caught:
        load(demo)
    assert "\n" not in str(caught.value)


def test_garbage_in_place_of_weights(demo: Path) -> None:
    (demo / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(demo)


def test_sharded_damage(demo: Path) -> None:
    where = shard(demo, 3)
    last = sorted(set(where.values()))[-1]
    (demo / last).unlink()
    with pytest.raises(CheckpointError, match=f"names weight files that are not there: {last}"):
        load(demo)
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "no safetensors file beside it"),
        ('{"weight_map": {"a": "a.bin"}}', "no safetensors file beside it"),
    ):
        (demo / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load(demo)


def test_directories_that_are_no_checkpoint(tmp_path: Path, demo: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at "):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        load("x" * 5000)
    with pytest.raises(CheckpointError, match=r"^~no-such-user/x cannot be read: "):
        load("~no-such-user/x")
    with pytest.raises(CheckpointError, match="is a file"):
        load(demo / "config.json")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)
    (demo / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds a config\.json but no weights"):
        load(demo)
    (demo / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\).*convert them to safetensors"):
        load(demo)
    for content in (b"{", b"[1]", b"\xff\xfe"):
        (demo / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds a JSON list)"):
            load(demo)


def test_damaged_tokenizer(demo: Path) -> None:
    (demo / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer of"):
        load(demo)


def test_bad_arguments(demo: Path) -> None:
    for parts in ((), "vision", ("vision", "audio")):
        with pytest.raises(InputError, match="parts is"):
            load(demo, parts=parts)
    with pytest.raises(InputError, match="dtype is"):
        load(demo, dtype=torch.int8)


def test_hub_id_fetches_only_what_the_parts_need(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = shard(demo, 12)
    fetched: list[list[str]] = []

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        assert hub_id == "lmms-lab/llava-onevision-qwen2-7b-ov"
        fetched.append(allow_patterns)
        return str(demo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load("lmms-lab/llava-onevision-qwen2-7b-ov", parts=("vision",))
    assert model.identity.name == "lmms-lab/llava-onevision-qwen2-7b-ov" and model.identity.format == "llava-next"
    weights = {pattern for pattern in fetched[-1] if pattern.endswith(".safetensors")}
    assert not any("safetensors" in pattern for pattern in fetched[0])
    assert weights == {file for key, file in where.items() if (locate(key, "llava-next") or "?")[0] == "vision"}
    assert len(weights) < 12
    assert not any(".bin" in pattern or ".py" in pattern for patterns in fetched for pattern in patterns)


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"^nobody/nothing is no directory here, and fetching it") as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
