"""Everything that `generate` and `forward` of a LlavaOnevision take is still taken when it is wrapped."""

import inspect

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module

from earlytom import InnerMerging, restore
from earlytom.errors import InputError
from earlytom.wrap import earlytom
from tests.cases import TINY, five_only, own_videos
from tests.llava_next import load_stand_in
from tests.onevision import IMAGE, expand, load_onevision

INNER = InnerMerging(3, 0.5)
PROMPT = [5, 6, 7, -200, 11, 12]
FRAMES = 4


@pytest.fixture(scope="module")
def original():
    return load_onevision(TINY)


@pytest.fixture
def model(original):
    yield original
    restore(original)


@pytest.fixture(scope="module")
def video(pixels):
    return {"input_ids": expand(PROMPT, FRAMES), "pixel_values_videos": pixels[None, :FRAMES]}


@pytest.fixture(scope="module")
def image(pixels):
    """A prompt with an image of 384 x 384: one base patch and one of the grid, 729 + 27 rows of 27 and a newline."""
    ids = torch.tensor([[5, *[IMAGE] * (729 + 27 * 28), 9]])
    return {"input_ids": ids, "pixel_values": pixels[None, 20:22], "image_sizes": torch.tensor([[384, 384]])}


def test_without_a_video_everything_is_as_if_it_were_not_wrapped(model, image):
    text = {"input_ids": torch.tensor([[0, 0, 5, 6], [9, 8, 7, 6]])}
    padded = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}  # no mask: generate makes one of the padding
    signature = inspect.signature(model.forward)
    expected = [model.generate(**image, **padded), model.generate(**text, **padded)]
    earlytom(model, environ={})
    assert inspect.signature(model.forward) == signature
    assert model._supports_logits_to_keep()
    assert torch.equal(model.generate(**image, **padded), expected[0])
    assert torch.equal(model.generate(**text, **padded), expected[1])
    assert model(text["input_ids"], logits_to_keep=1).logits.shape[1] == 1
    with pytest.raises(ValueError, match="typo"):
        model.generate(**text, typo=1)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True}], ids=["beams", "sampling"])
@pytest.mark.parametrize("inner", [None, INNER], ids=["plain", "inner"])
def test_several_answers_to_a_prompt(options, inner, model, video):
    earlytom(model, 0.3, inner=inner, environ={})
    answers = model.generate(**video, num_return_sequences=2, max_new_tokens=3, **({"do_sample": False} | options))
    length = video["input_ids"].shape[1]
    assert answers.shape == (2, length + 3) and torch.equal(answers[:, :length], video["input_ids"].expand(2, -1))
    if "num_beams" in options:
        single = model.generate(**video, max_new_tokens=3, do_sample=False, num_beams=2)
        assert torch.equal(single[0], answers[0]), "the best beam comes first"


def test_answers_come_with_what_was_asked_for(model, video):
    earlytom(model, 0.3, inner=INNER, environ={})
    plain = model.generate(**video, max_new_tokens=3, do_sample=False)
    length = video["input_ids"].shape[1]
    full = model.generate(
        **video, max_length=length + 3, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(full.sequences, plain) and len(full.scores) == 3
    assert [int(score.argmax()) for score in full.scores] == plain[0, length:].tolist()
    logits = model(**video, logits_to_keep=1).logits
    assert logits.shape == (1, 1, 512) and int(logits.argmax()) == int(plain[0, length])
    ids, pixels = video.values()
    torch.testing.assert_close(model(ids, None, None, pixels).logits[:, -1:], logits)  # arguments by position
    with pytest.raises(InputError, match="labels cannot go with a video"):
        model(**video, labels=video["input_ids"])


def test_a_static_cache_works_without_inner_merging_and_gives_way_to_it(model, video):
    arguments = {**video, "max_new_tokens": 3, "do_sample": False}
    for inner in (None, INNER):
        earlytom(model, 0.3, inner=inner, environ={})
        expected = model.generate(**arguments)
        if inner is None:
            full = model.generate(**arguments, cache_implementation="static", return_dict_in_generate=True)
            assert full.past_key_values.is_compileable, "it is a static one"
            assert torch.equal(full.sequences, expected)
        else:
            with pytest.warns(UserWarning, match="differ in length: using a dynamic cache"):
                assert torch.equal(model.generate(**arguments, cache_implementation="static"), expected)
            model.generation_config.cache_implementation = "static"
            with pytest.warns(UserWarning, match="differ in length"):
                assert torch.equal(model.generate(**arguments), expected)
            model.generation_config.cache_implementation = None


def test_a_tower_may_have_another_dtype_than_the_llm(video):
    model = load_onevision(TINY)
    earlytom(model, 0.3, environ={})
    expected = model(**video).logits[0, -1]
    body = getattr(model, "model", model)  # transformers before 4.52 has no such module
    parts = (body.vision_tower, body.multi_modal_projector)
    for part in parts:
        part.to(torch.bfloat16)
    for part in (*parts, None):
        logits = model(**video).logits[0, -1]
        assert logits.dtype == torch.float32
        # Eight bits of mantissa through six layers: a few percent of the norm, nowhere near another answer.
        assert torch.nn.functional.cosine_similarity(logits, expected, dim=0) > 0.98
        if part is not None:
            part.to(torch.float32)  # one after the other: also a bfloat16 projector behind a float32 encoder


class Count(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_restore_puts_back_a_hook_that_was_there(video):
    model, hook = load_onevision(TINY), Count()
    add_hook_to_module(model, hook)
    hooked = model.__dict__["forward"]
    earlytom(model, 0.3, environ={})
    earlytom(model, 0.5, environ={})
    assert inspect.signature(model.forward) == inspect.signature(hooked)
    model(**video)
    model(torch.tensor([[5, 6]]))
    assert hook.calls == 1, "the model's own forward is called with its hook"
    restore(model)
    assert model.__dict__["forward"] is hooked and "generate" not in model.__dict__
    model(torch.tensor([[5, 6]]))
    assert hook.calls == 2


@own_videos
def test_an_offloaded_model_is_refused_before_any_work(video):
    model = load_onevision(TINY)
    earlytom(model, 0.3, environ={})
    cpu_offload(model, execution_device=torch.device("cpu"))
    text = torch.tensor([[5, 6]])
    expected = model(text).logits
    with pytest.raises(InputError, match="are on meta, EarlyTom needs them on one device"):
        model.generate(**video, max_new_tokens=1)
    restored = restore(model)
    with pytest.raises(InputError, match="offloaded"):
        earlytom(model, environ={})
    assert torch.equal(restored(text).logits, expected)
    logits = restored(**video).logits
    assert logits.shape[1] == video["input_ids"].shape[1], "the hook put over ours leads to the model's own forward"


@five_only
@pytest.mark.parametrize("inner", [None, INNER], ids=["plain", "inner"])
def test_an_image_and_a_video_in_one_prompt(inner, model, image, pixels):
    """The image is encoded by the model itself and stays whole; with nothing merged the answer is the model's."""
    ids = torch.cat([image["input_ids"], expand(PROMPT, FRAMES)], dim=1)
    both = {**image, "input_ids": ids, "pixel_values_videos": pixels[None, :FRAMES]}
    expected = model(**both).logits
    earlytom(model, 1.0, merge_layers=(), inner=None, environ={})
    torch.testing.assert_close(model(**both).logits, expected, atol=1e-4, rtol=1e-4)
    earlytom(model, 0.3, inner=inner, environ={})
    call = model.forward.func.__self__._video_call("forward", (), both)
    assert call.videos == ((False, True),) and len(call.visuals[0][0]) == 729 + 27 * 28
    language = model.forward.func.__self__.shared.language
    (first, second), = call.embed(language)["visual_spans"].tolist()
    assert first[1] == 0 and second[1] == len(call.visuals[0][1]), "only the video is merged inside the LLM"
    answer = model.generate(**both, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer[:, : ids.shape[1]], ids) and answer.shape[1] == ids.shape[1] + 3
    with pytest.raises(InputError, match="1484 image tokens, and the images make 1485"):
        model(**{**both, "input_ids": ids[:, 2:]})


@own_videos
@pytest.mark.parametrize("between", [[8, 9], []], ids=["apart", "adjacent"])
def test_two_videos_in_one_prompt(between, model, pixels):
    one, other = expand([5, -200, *between], FRAMES), expand([-200, 11, 12], FRAMES)
    two = {
        "input_ids": torch.cat([one, other], dim=1),
        "pixel_values_videos": torch.stack([pixels[:FRAMES], pixels[16 : 16 + FRAMES]]),
    }
    expected = model(**two).logits
    earlytom(model, 1.0, merge_layers=(), inner=None, environ={})
    torch.testing.assert_close(model(**two).logits, expected, atol=1e-4, rtol=1e-4)
    earlytom(model, 0.3, inner=INNER, environ={})
    call = model.forward.func.__self__._video_call("forward", (), two)
    alone = [model.forward.func.__self__.encode(clip) for clip in two["pixel_values_videos"]]
    assert all(torch.equal(tokens, own) for tokens, own in zip(call.visuals[0], alone, strict=True))
    logits = model(**two).logits
    text, left = 3 + len(between), sum(len(tokens) - INNER.removed(len(tokens)) for tokens in alone)
    assert logits.shape[1] == text + left, "each loses its half"
    assert int(model.generate(**two, max_new_tokens=1, do_sample=False)[0, -1]) == int(logits[0, -1].argmax())


def test_a_batch_whose_clips_differ_in_counts(model, pixels):
    """Clips that leave different numbers of frames, and a prompt without a video: each as if it were alone."""
    clips = torch.stack([pixels[:8], pixels[8:16]])
    ids = expand(PROMPT, 8)
    text = torch.nn.functional.pad(torch.tensor([[5, 6, 9]]), (ids.shape[1] - 3, 0))
    earlytom(model, 0.3, inner=INNER, environ={})
    lengths = {len(model.forward.func.__self__.encode(clip)) for clip in clips}
    assert len(lengths) == 2, "the clips must differ"
    rows = torch.cat([ids, text, ids])
    mask = (torch.arange(rows.shape[1]) >= torch.tensor([[0], [ids.shape[1] - 3], [0]])).long()
    answers = model.generate(
        input_ids=rows, attention_mask=mask, pixel_values_videos=clips, max_new_tokens=3, do_sample=False
    )
    for row, clip in ((0, clips[0]), (2, clips[1])):
        alone = model.generate(input_ids=ids, pixel_values_videos=clip[None], max_new_tokens=3, do_sample=False)
        assert torch.equal(answers[row], alone[0])
    alone = model.generate(input_ids=torch.tensor([[5, 6, 9]]), max_new_tokens=3, do_sample=False)
    assert torch.equal(answers[1, -3:], alone[0, -3:])


def test_a_llava_next_prompt_may_hold_two_videos(pixels):
    """As transformers' does, at other lengths; the answer is the new ids alone."""
    prompt, clips = torch.tensor([[5, -200, 8, -200, 11]]), [pixels[:FRAMES], pixels[8 : 8 + FRAMES]]
    model, other = load_stand_in(TINY), load_onevision(TINY)
    for wrapped in (model, other):
        earlytom(wrapped, 0.3, inner=INNER, environ={})
    answer = model.generate(prompt, images=clips, modalities=["video"] * 2, max_new_tokens=3, do_sample=False)
    ids = expand(prompt[0].tolist(), FRAMES)
    expected = other.generate(input_ids=ids, pixel_values_videos=torch.stack(clips), max_new_tokens=3, do_sample=False)
    assert torch.equal(answer[0], expected[0, ids.shape[1] :])
    longer = [pixels[:FRAMES], pixels[8:14]]
    assert model.generate(prompt, images=longer, modalities=["video"] * 2, max_new_tokens=3).shape == (1, 3)
