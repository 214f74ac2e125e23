"""Device maps: what they may say, where weights then lie, and that the answers are those of the model in one place."""

from __future__ import annotations

import gc
import json
import os
from collections import namedtuple
from functools import cache
from pathlib import Path
from typing import Any

import accelerate.utils.modeling as memory
import pytest
import torch
from torch import Tensor

from earlytom import Model, load
from earlytom.checkpoint import dispatch, tensors
from earlytom.checkpoint.device_map import Place, place_blocks, read_device_map
from earlytom.config import InnerMerging
from earlytom.errors import CheckpointError, ConfigError, InputError
from earlytom.language.conversation import Conversation
from earlytom.language.decode import CompiledDecoder
from earlytom.language.prompt import VIDEO_TOKEN
from tests.cases import TINY
from tests.checkpoints import small_llava
from tests.earlytom.language.test_conversation import released
from tests.earlytom.language.test_qwen2 import ARCHIVE, CASES, METHODS, PROMPT, answer, video

pytestmark = pytest.mark.usefixtures("one_thread")

CPU: dict[str, Place] = {"": "cpu"}
AROUND_K = [  # for merging before layers 2 and 3
    {"": "disk"},
    CPU | {"model.layers.1": "disk", "model.layers.2": "disk"},
    CPU | {"model.layers.2": "disk"},
    CPU | {"model.layers.3": "disk", "model.embed_tokens": "disk", "lm_head": "disk"},
]


@cache
def plain() -> Model:
    return load(TINY, parts=("language",))


@cache
def expected(inner: InnerMerging | None) -> tuple[list[int], Tensor]:
    """Ids, and logits [1, 4, vocabulary], of the model in one place."""
    ids, logits = answer(plain().language, PROMPT, video(25), new=4, inner=inner)
    return ids.tolist(), logits


def spread(folder: Path, places: Any, **options: Any) -> Model:
    return load(TINY, parts=("language",), device_map=places, offload_folder=folder, **options)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("places", AROUND_K, ids=["all on disk", "k on disk", "k - 1 on disk", "ends on disk"])
def test_answers_are_those_of_the_model_in_one_place(places: dict[str, Place], tmp_path: Path) -> None:
    model = spread(tmp_path, places)
    for inner in (None, *METHODS, InnerMerging(3, 0.5, as_released=True)):
        ids, logits = answer(model.language, PROMPT, video(25), new=4, inner=inner)
        expected_ids, expected_logits = expected(inner)
        assert ids.tolist() == expected_ids
        assert (logits - expected_logits).norm() < 1e-6 * expected_logits.norm()


@pytest.mark.parametrize("case", [0, 3, 4])
def test_released_answers_also_to_a_second_question(case: int, tmp_path: Path) -> None:
    prompt, tokens, inner = CASES[case]["prompt"], torch.from_numpy(ARCHIVE[f"{case}_visual"]), released(case)
    k = inner.layer if inner else 3
    language = spread(tmp_path, CPU | {f"model.layers.{k - 1}": "disk", "lm_head": "disk"}).language
    conversation = Conversation(language)
    conversation.answer([*prompt[: prompt.index(VIDEO_TOKEN) + 1], 9, 8, 7], tokens, inner=inner, max_new_tokens=3)
    lengths: list[int] = []
    language.model.layers[0].register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    ids = conversation.answer(prompt, tokens, inner=inner, max_new_tokens=8)
    assert ids.tolist() == ARCHIVE[f"{case}_generated"].tolist()
    assert max(lengths) < len(tokens), "the video came from the cache"


def test_a_padded_batch(tmp_path: Path) -> None:
    model, prompts, videos = spread(tmp_path, AROUND_K[2]), [PROMPT, PROMPT[2:6]], [video(25), video(12, 1)]
    for inner in METHODS:
        ids, _ = answer(model.language, prompts, videos, new=3, inner=inner)
        assert ids.tolist() == answer(plain().language, prompts, videos, new=3, inner=inner)[0].tolist()


def test_weights_go_to_their_places_in_the_dtype_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once each, and what is on disk is not in memory."""
    read: list[str] = []
    monkeypatch.setattr(tensors, "_finite", lambda tensor: read.append(str(tensor.dtype)) or True)
    model = spread(tmp_path, CPU | {"model.layers.2": "disk", "lm_head": "disk"}, dtype=torch.bfloat16)
    names = {name: str(weight.device) for name, weight in model.language.named_parameters()}
    on_disk = sorted(name for name in names if name.startswith(("model.layers.2.", "lm_head.")))
    assert sorted(name for name, device in names.items() if device == "meta") == on_disk
    assert files(tmp_path) == [f"{name}.safetensors" for name in on_disk]
    assert read == ["torch.bfloat16"] * len(names)
    assert model.language.device == torch.device("cpu") and model.language.dtype == torch.bfloat16
    sizes = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert sizes < 1.1 * sum(2 * weight.numel() for weight in model.language.parameters() if weight.is_meta)
    embeds = model.language.get_input_embeddings()(torch.tensor([PROMPT[:3]]))
    assert model.language(inputs_embeds=embeds).logits.isfinite().all()


def test_the_folder_is_cleared_with_the_model_and_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made" / "here"
    first, second = spread(folder, {"": "disk"}), spread(folder, {"": "disk"})
    assert len(os.listdir(folder)) == 2, "two models do not meet"
    del first
    gc.collect()
    assert len(os.listdir(folder)) == 1
    assert answer(second.language, PROMPT, video(25), new=1)[0].numel() == 1
    read: list[int] = []

    def damaged(tensor: Tensor) -> bool:
        read.append(len(files(folder)))
        if len(read) == 5:
            raise CheckpointError("the fifth tensor is damaged")
        return True

    monkeypatch.setattr(tensors, "_finite", damaged)
    with pytest.raises(CheckpointError):
        spread(folder, {"": "disk"})
    assert read[-1] == read[0] + 4 and len(os.listdir(folder)) == 1


@pytest.mark.parametrize("places", [{"": "disk"}, CPU | {"model.embed_tokens": "disk", "lm_head": "disk"}])
def test_a_tied_matrix(places: dict[str, Place], tmp_path: Path) -> None:
    small_llava(tied=True).save_pretrained(tmp_path / "tied")
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = load(tmp_path / "tied").language(ids).logits
    model = load(tmp_path / "tied", device_map=places, offload_folder=tmp_path / "disk")
    assert (model.language(ids).logits - logits).norm() < 1e-6 * logits.norm()
    assert "lm_head.weight.safetensors" not in files(tmp_path / "disk"), "it is there once"
    with pytest.raises(ConfigError, match="which are one matrix in this checkpoint: give both one place"):
        load(tmp_path / "tied", device_map=CPU | {"lm_head": "disk"}, offload_folder=tmp_path / "disk")


def test_auto_is_all_in_memory_and_the_rest_on_disk_if_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spread(tmp_path, "auto")
    assert not any(weight.is_meta for weight in model.language.parameters()) and not os.listdir(tmp_path)
    layer = sum(4 * weight.numel() for weight in model.language.model.layers[0].parameters())
    embedding = 4 * model.language.model.embed_tokens.weight.numel()
    monkeypatch.setattr(memory, "get_max_memory", lambda *_: {"cpu": (embedding + 3.5 * layer) / 0.9})
    model = spread(tmp_path, "auto")
    places = [layer.self_attn.q_proj.weight.device.type for layer in model.language.model.layers]
    assert places[:2] == ["cpu", "cpu"] and places[-2:] == ["meta", "meta"]
    ids, _ = answer(model.language, PROMPT, video(25), new=4, inner=METHODS[0])
    assert ids.tolist() == expected(METHODS[0])[0]
    with pytest.raises(ConfigError, match=r"modules of the LLM fit on disk alone, and no offload folder was given"):
        load(TINY, parts=("language",), device_map="auto")


LAYERS = {f"model.layers.{i}": "cpu" for i in range(6)}


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"model": "cpu"}, "has no device for lm_head"),
        (LAYERS, "has no device for model.embed_tokens, model.norm, lm_head"),
        (CPU | {"model.layers.6": "cpu"}, r"names model.layers.6, which .* model.layers.0 to model.layers.5"),
        (CPU | {"language_model.model.norm": "cpu"}, "names language_model.model.norm, which the language model does"),
        (CPU | {"model.layers.3.mlp": "disk"}, "a part of model.layers.3, which must stay whole"),
        (CPU | {"lm_head.weight": "disk"}, "a part of lm_head, which must stay whole"),
        ({"": "gpu"}, "'' on 'gpu', it must be the number of a card such as 0, or cuda:0, cpu or disk"),
        ({"": -1}, "'' on -1"),
        ({"": True}, "'' on True"),
        ({"": 1.0}, r"'' on 1\.0"),
        ({"": None}, "'' on None"),
        ({"": 999}, "names card 999, and PyTorch sees"),
        ({"": "cuda:999"}, "names card 999, and PyTorch sees"),
        ({}, "is empty"),
        ({"": "disk"}, "puts the model on disk, and no offload folder was given"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(places: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earlytom.checkpoint.loader.read_tensors", lambda *_: pytest.fail("weights were read"))
    folder = None if "no offload folder" in said else "unused"
    with pytest.raises(ConfigError, match=said) as error:
        load(TINY, device_map=places, offload_folder=folder)
    assert "\n" not in str(error.value) and not Path("unused").exists()


def test_a_file_holds_a_map(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": 0, "model.layers.1": "cuda", "model.layers.2": "cuda:3", "lm_head": "disk"}))
    assert read_device_map(str(path)) == {"": 0, "model.layers.1": 0, "model.layers.2": 3, "lm_head": "disk"}
    assert read_device_map("auto") is None
    path.write_text("[1]")
    for bad, said in ((path, "it must hold an object"), (tmp_path / "none.json", "cannot be read: No such file"),
                      ("balanced", "auto or a JSON file")):
        with pytest.raises(ConfigError, match=said):
            read_device_map(bad)


def test_the_longest_name_counts_and_offloaded_blocks_compute_on_a_card() -> None:
    places = read_device_map({"": "cpu", "model.layers": 2, "model.layers.1": 1, "model.norm": "disk"})
    placement = place_blocks(places or {}, 12, tied=False)
    assert placement.of("model.layers.11.mlp.up_proj.weight") == 2 and placement.of("model.layers.1.mlp.x") == 1
    assert placement.of("lm_head.weight") == "cpu" and placement.of("model.norm.weight") == "disk"
    assert placement.main == "cuda:1" and placement.is_spread
    assert place_blocks({"model": 3, "lm_head": 0}, 2, tied=False).main == "cuda:3", "where the embedding is"
    assert not place_blocks({"": 1}, 2, tied=False).is_spread
    named = {**dict.fromkeys(LAYERS, 0), "model.embed_tokens": 1, "model.norm": 0, "lm_head": 0}
    assert place_blocks(named, 6, tied=False).places["model.rotary_emb"] == 1, "has no weights: may be left out"


def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="load that part"):
        load(TINY, parts=("vision",), device_map="auto")
    with pytest.raises(InputError, match="not on device meta"):
        load(TINY, device="meta", device_map="auto")
    with pytest.raises(InputError, match="an offload folder goes with a device map"):
        load(TINY, offload_folder=tmp_path)
    with pytest.raises(ConfigError, match="the whole model on one device, not spread"):
        CompiledDecoder(spread(tmp_path, AROUND_K[1]).language)


def test_what_the_machine_lacks_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the offload folder .*file/folder cannot be used: Not a directory"):
        spread(tmp_path / "file" / "folder", {"": "disk"})
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patched:
        patched.setattr(dispatch.shutil, "disk_usage", lambda _: usage(1000))
        with pytest.raises(ConfigError, match=r"0\.0 GB of the language model are to lie in .*, which has room for 0"):
            spread(tmp_path / "full", {"": "disk"})
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ConfigError, match=r"could not be written to: .*No space left on device"):
            spread(tmp_path / "full", {"": "disk"})
    assert not os.listdir(tmp_path / "full")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs accelerate: pip install earlytom-export\[device-map\]"):
        spread(tmp_path, "auto")
