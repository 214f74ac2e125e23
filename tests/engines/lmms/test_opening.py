"""The pipeline that --model_args ask for: published settings, the unpruned model, a bundle; and answers in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from earlytom.checkpoint import CheckpointIdentity, load
from earlytom.config import EarlyTomConfig
from earlytom.demo.film import write_film
from earlytom.demo.world import make_clip
from earlytom.errors import ConfigError, EarlyTomError, InputError
from earlytom.pipeline import VideoPipeline
from earlytom.presets import PRESETS, RATIOS, preset
from earlytom.reference import frame_counts
from earlytom.tower import StaticTower, split_videos
from earlytom.video import read_frames
from engines.lmms.answering import answer
from engines.lmms.arguments import ModelArguments
from engines.lmms.opening import config_of, open_arguments
from engines.lmms.questions import Generation, VideoQuestion
from tests.shared import demo_bundle, small_demo

FRAMES, PATCHES = 8, 49  # of the small demo: 7 x 7 after pooling


@pytest.fixture(scope="module")
def identity() -> CheckpointIdentity:
    """Of a checkpoint with the published depths."""
    small = load(small_demo(), device="meta").identity
    geometry = dataclasses.replace(small.geometry, layers=26)
    return dataclasses.replace(small, geometry=geometry, language_layers=28)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("videos")
    paths = [home / f"{index}.mp4" for index in range(2)]
    for index, path in enumerate(paths):
        write_film(make_clip("test", 0, index, frames=FRAMES), path, rate=8)
    return paths


@pytest.fixture(scope="module")
def pipeline() -> Iterator[VideoPipeline]:
    arguments = ModelArguments(bundle=str(demo_bundle()), engine="onnxruntime", threads=1)
    with open_arguments(arguments, "cpu") as opened:
        yield opened


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("benchmark", PRESETS)
def test_a_checkpoint_has_the_published_settings(benchmark: str, ratio: float, identity: CheckpointIdentity) -> None:
    arguments = ModelArguments(checkpoint="c", retain=ratio, preset=benchmark, inner="as-released")
    found, published = config_of(arguments, identity), preset(benchmark, ratio)
    assert found.inner is not None and found.inner.as_released
    assert published.inner is not None and found.inner == dataclasses.replace(published.inner, as_released=True)
    assert found.replace(inner=published.inner) == published


def test_llava_video_has_its_own(identity: CheckpointIdentity) -> None:
    video = dataclasses.replace(identity, newline="grid", pooling="average")
    assert config_of(ModelArguments(checkpoint="c", retain=0.25), video) == preset(retain=0.25, model="llava-video")


def test_the_unpruned_model_merges_nothing(identity: CheckpointIdentity) -> None:
    config = config_of(ModelArguments(checkpoint="c", retain=1), identity)
    assert config.replace(tau=0.5) == EarlyTomConfig(retain=1, merge_layers=(), inner=None)


@pytest.mark.parametrize("inner", ["on", "off"])
def test_inner_merging_is_as_asked_for(inner: str, identity: CheckpointIdentity) -> None:
    config = config_of(ModelArguments(checkpoint="c", retain=0.2, inner=inner), identity)
    assert config.inner == (preset().inner if inner == "on" else None)


def test_an_llm_of_one_layer_has_no_merging_to_be_as_released(identity: CheckpointIdentity) -> None:
    arguments = ModelArguments(checkpoint="c", retain=0.2, inner="as-released")
    with pytest.raises(ConfigError, match="no inner merging here to be as released"):
        config_of(arguments, dataclasses.replace(identity, language_layers=1))


def test_the_unpruned_model_gives_all_its_tokens(videos: list[Path]) -> None:
    arguments = ModelArguments(checkpoint=str(small_demo()), retain=1, frames=FRAMES)
    with open_arguments(arguments, "cpu") as opened:
        assert len(opened.encode(videos[0]).tokens) == FRAMES * PATCHES + 1


def test_fixed_budgets_are_the_static_towers(videos: list[Path]) -> None:
    arguments = ModelArguments(checkpoint=str(small_demo()), retain=0.25, frames=FRAMES, frame_budgets="fixed")
    with open_arguments(arguments, "cpu") as opened:
        found = opened.encode(videos[0])
        vision = opened.model.vision
        frames = torch.from_numpy(_frames(videos[0]))[None]
        with torch.no_grad():
            (expected,) = split_videos(StaticTower(vision, opened.config)(frames), opened.config, 7)
        assert torch.equal(found.tokens, expected.tokens)


def test_by_default_a_checkpoint_has_the_released_frame_counts(videos: list[Path]) -> None:
    arguments = ModelArguments(checkpoint=str(small_demo()), retain=0.25, frames=FRAMES)
    with open_arguments(arguments, "cpu") as opened:
        config = opened.config
        frames = torch.from_numpy(_frames(videos[0]))
        counts = frame_counts(opened.model.vision, frames, merge_layers=config.merge_layers, **config.segmenting)
        assert len(opened.encode(videos[0]).weights) == counts[-1]


def test_a_batch_answers_as_one_after_another(pipeline: VideoPipeline, videos: list[Path]) -> None:
    """Prompts of other lengths, videos that differ, and one twice; the bundle merges inside the LLM."""
    assert pipeline.config.inner is not None
    texts = ["What?", "What colour is the star: red or green?", "What happens?"]
    asked = [VideoQuestion(str(video), text, Generation(6), "x")
             for video, text in zip((videos[0], videos[0], videos[1]), texts)]
    alone = [answer(pipeline, [question])[0] for question in asked]
    together = answer(pipeline, asked)
    for one, other in zip(alone, together, strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    for question, reply in zip(asked, alone):
        encoded = pipeline.encode(question.video)
        found = pipeline.ask(encoded, question.text, max_new_tokens=6)
        assert (reply.text, reply.output_tokens) == (found.text.strip(), len(found.ids))
        assert reply.visual_tokens == len(encoded.tokens)


def test_token_counts_are_what_enters_the_language_model(pipeline: VideoPipeline, videos: list[Path]) -> None:
    entered: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append(kwargs["inputs_embeds"].shape[1])

    pipeline.forget()
    hook = pipeline.model.language.model.register_forward_pre_hook(count, with_kwargs=True)
    (reply,) = answer(pipeline, [VideoQuestion(str(videos[1]), "What?", Generation(1), "x")])
    hook.remove()
    assert entered == [reply.input_tokens] and reply.input_tokens > reply.visual_tokens > 1
    assert reply.output_tokens == 1


def test_merging_inside_can_be_left_out(videos: list[Path]) -> None:
    arguments = ModelArguments(bundle=str(demo_bundle()), engine="onnxruntime", inner="off", threads=1)
    with open_arguments(arguments, "cpu") as opened:
        (found,) = answer(opened, [VideoQuestion(str(videos[0]), "What?", Generation(4), "x")])
        expected = opened.ask(videos[0], "What?", max_new_tokens=4, merge_inside=False)
        assert opened.config.inner is None and found.text == expected.text.strip()


def test_a_video_that_cannot_be_read_is_named_with_its_document(pipeline: VideoPipeline, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    broken = VideoQuestion(str(tmp_path / "a.mp4"), "What?", Generation(), "document 3 of t")
    for asked in ([broken], [broken, broken]):
        with pytest.raises(InputError, match=r"^document 3 of t: .*a\.mp4"):
            answer(pipeline, asked)


@pytest.mark.parametrize(
    "arguments", [ModelArguments(bundle="nowhere"), ModelArguments(checkpoint="no where", retain=1)]
)
def test_what_is_not_there_is_told_in_a_sentence(arguments: ModelArguments) -> None:
    with pytest.raises(EarlyTomError) as refused:
        open_arguments(arguments, "cpu")
    assert "\n" not in str(refused.value)


def _frames(path: Path) -> Any:
    return read_frames(path, frames=FRAMES, size=196).frames
