"""The demo checkpoint: deterministic, readable, lively, and the same as transformers' LlavaOnevision."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from earlytom.checkpoint import Model, load
from earlytom.checkpoint.demo import WEIGHTS, demo_weights, write_demo
from earlytom.checkpoint.demo_tokenizer import SPECIAL, WORDS
from earlytom.checkpoint.files import read_header
from earlytom.checkpoint.keys import key_of
from earlytom.errors import CheckpointError
from earlytom.language.prompt import embed_prompt
from earlytom.language.qwen2 import check_layer, generate
from earlytom.presets import preset
from earlytom.shapes import derive_shapes
from earlytom.vision.geometry import VisionGeometry

QUESTION = "What happens in the video? Ünïcödé, 12 %\n"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With random weights: what is tested here of a model's looks is a promise of `random_weight`, not of training."""
    return load(write_demo(tmp_path_factory.mktemp("demo"), seed=0))


@pytest.fixture(scope="module")
def video(e2e_frames: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(e2e_frames[[3, 4, 8, 20]].copy())


def prompt(demo: Model) -> list[int]:
    before, after = demo.tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat happens?"}], tokenize=False, add_generation_prompt=True
    ).split("<image>")
    return [*demo.tokenizer(before).input_ids, -200, *demo.tokenizer(after).input_ids]


def test_geometry_and_identity() -> None:
    demo = load("demo")
    expected = VisionGeometry(hidden_size=96, heads=3, intermediate_size=384, layers=8, projector_size=128)
    assert demo.geometry == expected and expected.patches == 729
    assert (demo.identity.name, demo.identity.format) == ("demo", "demo")
    assert demo.language is not None and demo.language.config.num_hidden_layers == 7
    assert demo.language.config.vocab_size == len(demo.tokenizer)
    eos = demo.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert eos == demo.tokenizer.eos_token_id and demo.eos_token_ids[0] == eos
    assert load("demo", parts=("vision",)).identity == demo.identity
    assert demo.vision is not None and not demo.vision.training and not demo.language.training


@pytest.mark.parametrize("benchmark", ["mvbench", "videomme", "longvideobench", "egoschema"])
def test_every_published_setting_is_valid_at_its_depth(demo: Model, benchmark: str) -> None:
    assert demo.language is not None
    for retain in (0.1, 0.15, 0.2, 0.25):
        config = preset(benchmark, retain, depth=demo.geometry.layers, llm_layers=demo.identity.language_layers)
        assert len(config.merge_layers) == 3, "no two of the published layers fall on one"
        assert derive_shapes(config, demo.geometry).visual_tokens
        assert config.inner is not None
        check_layer(demo.language.config, config.inner)


@pytest.mark.parametrize("format", ["llava-next", "transformers"])
def test_writing_is_deterministic(tmp_path: Path, format: str) -> None:
    def digests(name: str, seed: int) -> dict[str, str]:
        made = write_demo(tmp_path / name, format=format, seed=seed)
        files = sorted(path for path in made.rglob("*") if path.is_file())
        return {str(path.relative_to(made)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    first, again, other = digests("a", 0), digests("b", 0), digests("c", 1)
    assert first == again
    assert [name for name in first if first[name] != other[name]] == ["model.safetensors"]
    identities = [load(tmp_path / name, device="meta").identity.digest for name in "abc"]
    assert identities[0] == identities[1] != identities[2]


def test_both_formats_hold_the_same_model(demo: Model, tmp_path: Path) -> None:
    for format in ("llava-next", "transformers"):
        model = load(write_demo(tmp_path / format, format=format, seed=0))
        assert model.identity.format == format and model.geometry == demo.geometry
        assert model.eos_token_ids == demo.eos_token_ids
        for mine, theirs in ((model.vision, demo.vision), (model.language, demo.language)):
            assert mine is not None and theirs is not None
            expected = theirs.state_dict()
            assert mine.state_dict().keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in mine.state_dict().items())


@pytest.fixture
def other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of another seed in the place of the trained ones."""
    path = tmp_path / "weights.safetensors"
    save_file({key_of(slot, "llava-next"): tensor for slot, tensor in demo_weights(5).items()}, path)
    monkeypatch.setattr("earlytom.checkpoint.demo.WEIGHTS", path)
    return path


@pytest.mark.parametrize("format", ["llava-next", "transformers"])
def test_without_a_seed_the_weights_are_those_of_the_file(other_weights: Path, tmp_path: Path, format: str) -> None:
    made, expected = (write_demo(tmp_path / f"{seed}", format=format, seed=seed) for seed in (None, 5))
    for name in (path.relative_to(expected) for path in expected.rglob("*") if path.is_file()):
        assert (made / name).read_bytes() == (expected / name).read_bytes()


def test_the_identity_follows_the_weights(other_weights: Path, demo: Model, tmp_path: Path) -> None:
    identity = load("demo", device="meta").identity
    assert identity.digest == load(write_demo(tmp_path / "same", seed=5), device="meta").identity.digest
    assert identity.digest != demo.identity.digest


def test_damaged_weights_are_refused(other_weights: Path) -> None:
    other_weights.write_bytes(other_weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not a safetensors file, or it is damaged"):
        load("demo")


def test_missing_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earlytom.checkpoint.demo.WEIGHTS", tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"trained weights are not at .*weights\.safetensors: install"):
        demo_weights(None)


def test_nothing_stands_in_for_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earlytom.checkpoint.demo.WEIGHTS", tmp_path / "weights.safetensors")
    try:
        write_demo(tmp_path / "demo")
    except CheckpointError:
        assert not (tmp_path / "demo").exists()
    else:
        raise AssertionError("written without weights")


def test_the_trained_weights_that_come_with_the_package() -> None:
    assert WEIGHTS.stat().st_size <= 12e6
    found = {key: (stored.dtype, stored.shape) for key, stored in read_header(WEIGHTS).items()}
    wanted = {key_of(slot, "llava-next"): ("F32", tuple(tensor.shape)) for slot, tensor in demo_weights(0).items()}
    assert found == wanted
    assert all(tensor.isfinite().all() for tensor in demo_weights(None).values())


def test_tokenizer(demo: Model) -> None:
    tokenizer = demo.tokenizer
    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"user\n{QUESTION}\n"
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer(" a man walks through the snow.").input_ids == [
        *(tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in ("a", "man", "walks", "through", "the", "snow")),
        tokenizer.convert_tokens_to_ids("."),
    ]
    for word in set(WORDS.split()):
        assert len(tokenizer(f" {word}").input_ids) == 1
    for token in SPECIAL:
        assert len(tokenizer(token).input_ids) == 1
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def test_attention_and_frames_differ(demo: Model, video: Tensor) -> None:
    """Where published settings merge: attention is uneven, a frame is like the next and unlike those far from it."""
    merging = preset("videomme", 0.2, depth=demo.geometry.layers).merge_layers
    assert demo.vision is not None
    x = demo.vision.embed(video)
    for i, layer in enumerate(demo.vision.layers):
        x, received = layer(x, received=i in merging)
        if received is None:
            continue
        relative = received * demo.geometry.patches  # 1 is uniform
        assert relative.std() > 0.3 and relative.max() > 5 and relative.min() < 0.5
        unit = torch.nn.functional.normalize(x, dim=-1)
        similarity = torch.einsum("isd,jsd->ij", unit, unit) / unit.shape[1]
        assert similarity[0, 1] > 0.85 and similarity[0, 2:].max() < 0.8
        assert 0.1 < x.std() < 10


@torch.no_grad()
def test_answers_are_words_and_vary(demo: Model, video: Tensor) -> None:
    assert demo.vision is not None
    answers = [
        generate(demo, prompt(demo), demo.vision.encode_all(frames), max_new_tokens=8).tolist()
        for frames in (video[:1], video[2:3])
    ]
    words = set(WORDS.split()) | set(".,?!")
    for ids in answers:
        assert len(set(ids)) >= 4
        assert all(word in words for word in demo.tokenizer.decode(ids).split())
    assert answers[0] != answers[1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(demo: Model, video: Tensor, dtype: torch.dtype, tmp_path: Path) -> None:
    """Over all logits of a prompt, whichever kernels a CPU has: the largest one moves with the order of sums.

    Each layer adds twice to a residual stream and rounds it, by up to half an eps; roundings are independent, so that
    n of them come to sqrt(n) of one. Twice that: an eps times sqrt(n). Measured on four kinds of CPU: .35 of it.
    """
    half = load(write_demo(tmp_path, seed=0), dtype=dtype)
    found = []
    for model in (demo, half):
        assert model.vision is not None and model.language is not None
        visual = model.vision.encode_all(video[:1])
        assert visual.dtype == model.vision.dtype and visual.isfinite().all()
        embeds, _ = embed_prompt(model.language, prompt(demo), visual)
        found.append((visual.float(), model.language(inputs_embeds=embeds).logits[0].float()))
    tower, llm = demo.geometry.layers, demo.identity.language_layers
    for layers, full, rounded in zip((tower, tower + llm), *found):
        assert rounded.isfinite().all()
        assert (full - rounded).norm() < torch.finfo(dtype).eps * (2 * layers) ** 0.5 * full.norm()
        assert not torch.equal(full, rounded), "it is half precision that is measured"


@torch.no_grad()
def test_unpruned_demo_is_transformers_llava_onevision(tmp_path: Path, video: Tensor) -> None:
    from transformers import LlavaOnevisionForConditionalGeneration

    directory = write_demo(tmp_path / "demo", format="transformers", seed=0)
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    ours = load(directory)
    assert ours.vision is not None and ours.language is not None
    frames = video[1:3]
    pixels = ((frames.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)

    hidden = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == 1 + ours.geometry.layers
    torch.testing.assert_close(ours.vision.encode(frames), hidden[-1], rtol=0, atol=1e-5)

    ids = prompt(ours)
    at = ids.index(-200)
    visual = ours.vision.encode_all(frames)
    assert visual.shape == (2 * 196 + 1, ours.geometry.projector_size)
    theirs_ids = [*ids[:at], *[theirs.config.video_token_index] * len(visual), *ids[at + 1 :]]
    expected = theirs(input_ids=torch.tensor([theirs_ids]), pixel_values_videos=pixels[None]).logits
    embed = ours.language.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor(ids[:at])), visual, embed(torch.tensor(ids[at + 1 :]))])
    torch.testing.assert_close(ours.language(inputs_embeds=embeds[None]).logits, expected, rtol=0, atol=1e-4)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"format 'gguf'.*llava-next and transformers"):
        write_demo(tmp_path, format="gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_demo(tmp_path / "file")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name != "model.safetensors":
            return real(path, data)
        real(path, data[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for write in (lambda: load("demo"), lambda: write_demo(tmp_path), lambda: write_demo(tmp_path / "a" / "b")):
        with pytest.raises(CheckpointError, match=r"the demo, 11 MB, cannot be written to .*: No space left on dev"):
            write()
        assert not list(tmp_path.iterdir())
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="No space left"):
        write_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_no_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"no temporary directory to write the demo to \(TMPDIR\): No such file"):
        load("demo")
