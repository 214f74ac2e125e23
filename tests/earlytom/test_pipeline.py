"""A real clip, decoded, encoded and answered by the demo checkpoint."""

from dataclasses import replace

import pytest
import torch

from earlytom import InnerMerging, VideoPipeline, load, preset, read_frames
from earlytom.checkpoint import write_demo
from earlytom.errors import CheckpointError, InputError
from earlytom.language.prompt import VIDEO_TOKEN, build_prompt
from earlytom.language.qwen2 import generate
from earlytom.tower import StaticTower, TowerOutputs, split_videos
from tests import clips
from tests.cases import small_clip, small_config, small_vision

FRAMES = 16  # of 32, so that the quick suite stays quick


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return load(write_demo(tmp_path_factory.mktemp("demo"), seed=0))  # it says something about any clip


@pytest.fixture(scope="module")
def pipeline(demo):
    layers, llm_layers = demo.geometry.layers, demo.identity.language_layers
    config = preset("videomme", 0.2, frames=FRAMES, depth=layers, llm_layers=llm_layers)
    tower = StaticTower(demo.vision, config)
    return VideoPipeline(tower, demo, config)


@pytest.fixture(scope="module")
def encoded(pipeline):
    return pipeline.encode(torch.from_numpy(read_frames(clips.real("bikes"), frames=FRAMES).frames))


def test_a_real_clip_is_answered(pipeline, encoded):
    shapes = pipeline.encoder.shapes
    assert encoded.tokens.shape == (round(0.2 * FRAMES * 196 / 4) * 4 + 1, pipeline.model.geometry.projector_size)
    assert torch.isfinite(encoded.tokens).all() and encoded.seconds > 0
    heard = []
    answer = pipeline.ask(encoded, "What happens in this video?", max_new_tokens=12, on_text=heard.append)
    assert "".join(heard) == answer.text and len(answer.text) > 0
    assert 1 <= len(answer.ids) <= 12 and answer.prefill_seconds > 0
    prompt = build_prompt(pipeline.model.tokenizer, "What happens in this video?")
    expected = generate(
        pipeline.model, prompt, encoded.tokens, inner=InnerMerging(4, 0.5), max_new_tokens=12
    )
    assert list(answer.ids) == expected.tolist(), "the default is the configuration's inner merging"
    assert shapes.visual_tokens == len(encoded.tokens) - 1


def test_one_video_is_asked_several_things_without_encoding_it_again(pipeline, encoded):
    run, pipeline._run = pipeline._run, None
    first = pipeline.ask(encoded, "What is this?", max_new_tokens=4)
    other = pipeline.ask(encoded, "How many people are there?", max_new_tokens=4)
    assert pipeline.ask(encoded, "What is this?", max_new_tokens=4).ids == first.ids
    plain = pipeline.ask(encoded, "What is this?", max_new_tokens=4, merge_inside=False)
    assert other.ids and plain.ids
    pipeline._run = run


def test_later_questions_have_the_answers_that_they_would_have_first(pipeline, encoded):
    questions = ["What is this?", "How many people are there?"]
    alone = [pipeline.ask(encoded, question, max_new_tokens=4, reuse=False).ids for question in questions]
    pipeline.forget()
    assert [pipeline.ask(encoded, question, max_new_tokens=4).ids for question in questions] == alone
    kept = pipeline._conversation._last
    assert kept.visual_tokens is encoded.tokens and kept.cache.get_seq_length() > len(encoded.tokens)
    pipeline.forget()
    assert pipeline._conversation._last is None and pipeline._last is None


def test_decoding_can_be_compiled(pipeline, demo, encoded, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: compiled.append(step) or step)
    with VideoPipeline(pipeline.encoder, demo, pipeline.config, compile=True) as other:
        expected = pipeline.ask(encoded, "What is this?", max_new_tokens=4)
        answer = other.ask(encoded, "What is this?", max_new_tokens=4)
        assert answer.ids == expected.ids and answer.text == expected.text and answer.prefill_seconds > 0
    assert len(compiled) == 1


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
    videos = split_videos(outputs, config, tower.shapes.pooled_grid)
    for v, video in enumerate(videos):
        newlines = (video.tokens == vision.image_newline).all(-1)
        rows = sum(len(set((kept // 3).tolist())) for kept in video.positions)
        assert int(newlines.sum()) == rows and len(video.tokens) == rows + tower.shapes.visual_tokens
        assert torch.equal(video.tokens, outputs.tokens[v, : len(video.tokens)])


def test_a_file_is_encoded_once_and_again_when_it_changes(pipeline, encoded, tmp_path, monkeypatch):
    calls, path = [], tmp_path / "clip.mp4"
    outputs = tuple(getattr(encoded, name)[None] for name in TowerOutputs._fields)
    monkeypatch.setattr(pipeline, "_run", lambda frames: calls.append(1) or TowerOutputs(*outputs))
    path.write_bytes(clips.real("bikes").read_bytes())
    first = pipeline.ask(path, "What is this?", max_new_tokens=2)
    kept = pipeline._conversation._last.cache
    assert pipeline.ask(str(path), "What is this?", max_new_tokens=2).ids == first.ids and len(calls) == 1
    assert pipeline._conversation._last.cache is kept, "and goes through the language model once"
    frames = read_frames(path, frames=FRAMES).frames
    assert pipeline.ask(frames, "What is this?", max_new_tokens=2).ids == first.ids and len(calls) == 2
    path.write_bytes(clips.real("carphone").read_bytes())
    assert pipeline.encode(path).tokens.shape == encoded.tokens.shape and len(calls) == 3


@pytest.mark.parametrize("wrong", [torch.zeros(3, 384, 384, 3, dtype=torch.uint8), torch.zeros(FRAMES, 384, 384, 3)])
def test_frames_that_do_not_fit_are_refused(pipeline, wrong):
    with pytest.raises(InputError, match=rf"must be uint8 \[{FRAMES}, 384, 384, 3\]"):
        pipeline.ask(wrong, "What is this?")


def test_a_pipeline_needs_a_language_model_and_a_tokenizer(demo):
    config = preset("videomme", 0.2, frames=FRAMES)
    for lacking in ("language", "tokenizer"):
        with pytest.raises(CheckpointError, match="so a question cannot be put"):
            VideoPipeline(lambda frames: None, replace(demo, **{lacking: None}), config)
