"""`earlytom(model)` on live models of both kinds: the golden answers, one instance only, and undone."""

import copy

import pytest
import torch

import earlytom as package
from earlytom import InnerMerging, restore
from earlytom.errors import ConfigError, InputError
from earlytom.wrap import earlytom
from tests.cases import TINY, cases, golden_settings, own_videos
from tests.llava_next import load_stand_in
from tests.onevision import VIDEO, load_onevision, question

E2E = cases("e2e/e2e")


@pytest.fixture(scope="module")
def stand_in():
    return load_stand_in(TINY)


@pytest.fixture(scope="module")
def onevision():
    return load_onevision(TINY)


@pytest.fixture(autouse=True)
def plain(stand_in, onevision):
    yield
    restore(stand_in)
    restore(onevision)


def wrapper_of(model):
    return model.generate.func.__self__


@pytest.mark.parametrize("kind", ["stand_in", "onevision"])
@pytest.mark.parametrize("case", E2E, ids=str)
def test_by_default_the_released_answers_come_out_whatever_the_counts(case, kind, request, pixels, monkeypatch):
    model = request.getfixturevalue(kind)
    assert earlytom(model, case.meta["retain_ratio"], **golden_settings(case.meta)) is model
    wrapper, seen = wrapper_of(model), []
    encode = wrapper.encode
    monkeypatch.setattr(wrapper, "encode", lambda video: seen.append(encode(video)) or seen[-1])
    arguments = question(model, case.meta["prompt"], pixels)
    options = {"return_dict_in_generate": True, "output_logits": True}
    answer = model.generate(**arguments, max_new_tokens=8, do_sample=False, **options)
    torch.testing.assert_close(seen[0], case["visual"], atol=1e-4, rtol=0)
    torch.testing.assert_close(answer.logits[0][0], case["first_logits"], atol=1e-3, rtol=0)
    assert answer.sequences[0, -8:].tolist() == case["generated"].tolist()
    assert answer.sequences.shape[1] == 8 + (0 if kind == "stand_in" else arguments["input_ids"].shape[1])


@pytest.mark.parametrize("case", [E2E[0], E2E[3]], ids=str)
def test_at_the_released_counts_fixed_budgets_give_the_released_answer(case, stand_in, pixels):
    budgets = tuple(after for _, after in case.meta["stages"])
    model = earlytom(stand_in, case.meta["retain_ratio"], frame_budgets=budgets, **golden_settings(case.meta))
    prompt = torch.tensor([case.meta["prompt"]])
    ids = model.generate(prompt, images=[pixels], modalities=["video"], max_new_tokens=8, do_sample=False)
    assert ids[0].tolist() == case["generated"].tolist()
    logits = model(prompt, images=[pixels], modalities=["video"]).logits
    torch.testing.assert_close(logits[0, -1], case["first_logits"], atol=1e-3, rtol=0)
    with pytest.raises(InputError, match="a video has 8 frames and the frame budgets are for 32"):
        model.generate(prompt, images=[pixels[:8]], modalities=["video"])


def test_only_that_instance_changes_and_only_until_it_is_restored(stand_in, pixels):
    other = load_stand_in(TINY)
    prompt, images = torch.tensor([E2E[0].meta["prompt"]]), [pixels[:2]]
    arguments = {"images": images, "modalities": ["video"], "max_new_tokens": 3, "do_sample": False}
    before, names = stand_in.generate(prompt, **arguments), list(stand_in.state_dict())
    methods = dict(type(stand_in).__dict__)
    earlytom(stand_in, 0.5, environ={})
    assert list(stand_in.state_dict()) == names and dict(type(stand_in).__dict__) == methods
    assert torch.equal(other.generate(prompt, **arguments), before)
    assert {"generate", "forward"} <= set(stand_in.__dict__)
    earlytom(stand_in, 0.25, environ={})  # again: replaced, not stacked
    restore(stand_in)
    assert not {"generate", "forward"} & set(stand_in.__dict__)
    assert torch.equal(stand_in.generate(prompt, **arguments), before)


def test_calls_without_a_video_go_to_the_model_itself(stand_in, pixels):
    text = torch.tensor([[5, 6, 7, 11]])
    expected = stand_in.generate(text, max_new_tokens=3, do_sample=False)
    image = stand_in.generate(
        torch.tensor([[5, -200, 7]]), images=[pixels[:1]], modalities=["image"], max_new_tokens=3, do_sample=False
    )
    earlytom(stand_in, environ={})
    assert torch.equal(stand_in.generate(text, max_new_tokens=3, do_sample=False), expected)
    again = stand_in.generate(
        torch.tensor([[5, -200, 7]]), images=[pixels[:1]], modalities=["image"], max_new_tokens=3, do_sample=False
    )
    assert torch.equal(again, image)


def test_the_environment_is_read_when_wrapping_and_never_again(stand_in, pixels, monkeypatch):
    environ = {"RETAIN_RATIO": "0.25", "T": "0.3", "M": "8", "PRUNE_LAYERS": "2,3,5"}
    model = earlytom(stand_in, environ=environ)
    config = wrapper_of(model).config
    assert (config.retain, config.tau, config.max_window, config.merge_layers) == (0.25, 0.3, 8, (2, 3, 5))
    assert wrapper_of(earlytom(stand_in, 0.5, environ=environ)).config.retain == 0.5
    monkeypatch.setenv("T", "nonsense")
    prompt = torch.tensor([E2E[0].meta["prompt"]])
    model.generate(prompt, images=[pixels[:8]], modalities=["video"], max_new_tokens=1)
    with pytest.raises(ConfigError, match="environment variable T"):
        earlytom(stand_in)


def test_weights_are_shared_and_follow_a_cast(stand_in, pixels):
    model = load_stand_in(TINY)
    earlytom(model, 0.5, environ={})
    wrapper = wrapper_of(model)
    tower, language = wrapper._parts()
    assert tower.vision.linear_1.weight.data_ptr() == model.model.mm_projector[0].weight.data_ptr()
    assert language.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    model.to(torch.bfloat16)
    prompt = torch.tensor([E2E[0].meta["prompt"]])
    model.generate(prompt, images=[pixels[:8]], modalities=["video"], max_new_tokens=2, do_sample=False)
    tower, language = wrapper._parts()
    assert tower.vision.dtype == torch.bfloat16 and language.dtype == torch.bfloat16
    assert tower.vision.linear_1.weight.data_ptr() == model.model.mm_projector[0].weight.data_ptr()
    copied = wrapper_of(copy.deepcopy(model))
    assert copied.model is not model and copied.own["forward"].__self__ is copied.model, "a copy has its own wrapper"


@own_videos
def test_a_transformers_model_unpruned_is_itself_and_pruned_is_shorter(onevision, pixels):
    """With everything kept EarlyTom changes nothing; with a fifth of the tokens the prefill is a fifth as long."""
    video = pixels[None, :4]
    token = VIDEO
    ids = torch.tensor([[5, 6, *[token] * (4 * 196 + 1), 7, 8]])
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": video}
    generated = onevision.generate(**arguments, max_new_tokens=4, do_sample=False)
    logits = onevision(**arguments).logits
    earlytom(onevision, config=package.EarlyTomConfig(retain=1, frames=4, merge_layers=()))
    torch.testing.assert_close(onevision(**arguments).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(onevision.generate(**arguments, max_new_tokens=4, do_sample=False), generated)
    earlytom(onevision, 0.5, frames=4, inner=None, environ={})
    short = onevision(**arguments).logits
    assert short.shape[1] == 4 + 4 * 98 + 1
    with_prompt = onevision.generate(**arguments, max_new_tokens=4, do_sample=False)
    assert torch.equal(with_prompt[:, : ids.shape[1]], ids) and with_prompt.shape[1] <= ids.shape[1] + 4
    restore(onevision)
    assert torch.equal(onevision.generate(**arguments, max_new_tokens=4, do_sample=False), generated)


def test_what_does_not_fit_is_refused(stand_in, onevision, pixels):
    with pytest.raises(InputError, match="LlavaOnevisionForConditionalGeneration"):
        earlytom(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="merge layer 40 does not exist"):
        earlytom(stand_in, merge_layers=(1, 2, 40), environ={})
    with pytest.raises(ConfigError, match="before layer 9"):
        earlytom(stand_in, inner=InnerMerging(9), environ={})
    with pytest.raises(ConfigError, match="not both"):
        earlytom(stand_in, 0.2, config=package.EarlyTomConfig())
    assert "generate" not in stand_in.__dict__, "a failed call leaves the model as it was"
    earlytom(onevision, environ={})
    gap = torch.tensor([[5, VIDEO, 6, VIDEO]])
    with pytest.raises(InputError, match="the prompts hold 2 videos and pixel_values_videos 1"):
        onevision.generate(input_ids=gap, pixel_values_videos=pixels[None, :8], max_new_tokens=1)
    earlytom(stand_in, environ={})
    prompt = torch.tensor([E2E[0].meta["prompt"]])
    with pytest.raises(InputError, match="takes videos alone, not image and video"):
        stand_in.generate(prompt, images=[pixels[:1], pixels[:8]], modalities=["image", "video"])
    with pytest.raises(InputError, match=r"hold 1 videos \(-200\), and 2 were passed"):
        stand_in.generate(prompt, images=[pixels[:4], pixels[:8]], modalities=["video", "video"])


def test_every_public_name_is_there():
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package._HOMES) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
