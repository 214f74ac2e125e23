"""A real clip, decoded, encoded and answered by the demo checkpoint."""

import pytest
import torch

from earlytom import InnerMerging, VideoPipeline, load, preset, read_frames
from earlytom.errors import InputError
from earlytom.language.prompt import VIDEO_TOKEN, build_prompt
from earlytom.language.qwen2 import generate
from earlytom.shapes import derive_shapes
from earlytom.tower import StaticTower, split_videos
from tests import clips
from tests.cases import small_clip, small_config, small_vision

FRAMES = 16  # of 32, so that the quick suite stays quick


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def pipeline(demo):
    config = preset("videomme", 0.2, frames=FRAMES)
    tower = StaticTower(demo.vision, config)
    return VideoPipeline(tower, demo.language, demo.tokenizer, config, tower.shapes, demo.eos_token_ids)


@pytest.fixture(scope="module")
def encoded(pipeline):
    return pipeline.encode(torch.from_numpy(read_frames(clips.real("bikes"), frames=FRAMES).frames))


def test_a_real_clip_is_answered(pipeline, encoded):
    shapes = pipeline.shapes
    assert encoded.tokens.shape == (round(0.2 * FRAMES * 196 / 4) * 4 + 1, 64)
    assert torch.isfinite(encoded.tokens).all() and encoded.seconds > 0
    heard = []
    answer = pipeline.ask(encoded, "What happens in this video?", max_new_tokens=12, on_text=heard.append)
    assert "".join(heard) == answer.text and len(answer.text) > 0
    assert 1 <= len(answer.ids) <= 12 and answer.prefill_seconds > 0
    prompt = build_prompt(pipeline.tokenizer, "What happens in this video?")
    expected = generate(
        pipeline.language, prompt, encoded.tokens, inner=InnerMerging(18, 0.5), max_new_tokens=12,
        eos_token_id=list(pipeline.eos_token_ids), pad_token_id=0,
    )  # fmt: skip
    assert list(answer.ids) == expected.tolist(), "the default is the configuration's inner merging"
    assert shapes.visual_tokens == len(encoded.tokens) - 1


def test_one_video_is_asked_several_things_without_encoding_it_again(pipeline, encoded):
    pipeline_encoder, pipeline.encoder = pipeline.encoder, None
    first = pipeline.ask(encoded, "What is this?", max_new_tokens=4)
    other = pipeline.ask(encoded, "How many people are there?", max_new_tokens=4)
    assert pipeline.ask(encoded, "What is this?", max_new_tokens=4).ids == first.ids
    plain = pipeline.ask(encoded, "What is this?", max_new_tokens=4, merge_inside=False)
    assert other.ids and plain.ids
    pipeline.encoder = pipeline_encoder


def test_the_prompt_is_chatml_around_the_video(demo):
    ids = build_prompt(demo.tokenizer, "What is this?")
    at = ids.index(VIDEO_TOKEN)
    assert ids.count(VIDEO_TOKEN) == 1
    before, after = demo.tokenizer.decode(ids[:at]), demo.tokenizer.decode(ids[at + 1 :])
    assert before == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert after == "\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == demo.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_padding_of_grid_newlines_is_cut_off_per_video():
    vision, config = small_vision(newline="grid"), small_config(newline="grid", retain=0.15)
    tower = StaticTower(vision, config, batch=2)
    outputs = tower(small_clip(12, videos=2))
    videos = split_videos(outputs, config, tower.shapes)
    for v, video in enumerate(videos):
        newlines = (video.tokens == vision.image_newline).all(-1)
        rows = sum(len(set((kept // 3).tolist())) for kept in video.positions)
        assert int(newlines.sum()) == rows and len(video.tokens) == rows + tower.shapes.visual_tokens
        assert torch.equal(video.tokens, outputs.tokens[v, : len(video.tokens)])


def test_a_pipeline_takes_one_video_a_call(demo):
    config = preset("videomme", 0.2, frames=FRAMES)
    shapes = derive_shapes(config, demo.vision.geometry, batch=2)
    with pytest.raises(InputError, match="takes 2 videos"):
        VideoPipeline(lambda frames: None, demo.language, demo.tokenizer, config, shapes)
