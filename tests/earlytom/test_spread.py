"""`earlytom(model)` on models that accelerate has spread or offloaded: the golden answers, or a refusal."""

import warnings

import pytest
import torch
from accelerate import dispatch_model

from earlytom import restore
from earlytom.errors import InputError
from earlytom.wrap import earlytom
from tests.cases import TINY, cases, golden_settings, nested
from tests.llava_next import load_stand_in
from tests.onevision import load_onevision, question

CASE = cases("e2e/e2e")[3]  # with inner merging before layer 3
META = CASE.meta
LOADERS = {"stand_in": (load_stand_in, "model."), "onevision": (load_onevision, "model.language_model.")}
pytestmark = pytest.mark.usefixtures("one_thread")


def spread(kind, folder, on_disk, **options):
    """The model with these modules of its language part on disk; `layers.2` for all of layer 2."""
    load, prefix = LOADERS[kind]
    model = load(TINY)
    own = [name for name, _ in model.model.named_children() if name not in ("layers", "language_model")]
    places = dict.fromkeys([f"model.{name}" for name in own], "cpu") | {"model.image_newline": "cpu", "lm_head": "cpu"}
    parts = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(6))]
    places |= {prefix + part: "disk" if part in on_disk else "cpu" for part in parts}
    places |= {name: "disk" for name in on_disk if name.startswith(("model.", "lm_head"))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following device_map keys")  # the newline is no module, as transformers'
        return dispatch_model(model, places, offload_dir=folder, skip_keys="past_key_values", **options)


@pytest.mark.parametrize(
    ("kind", "on_disk", "options"),
    [
        ("stand_in", ["layers.3", "embed_tokens", "lm_head"], {}),
        pytest.param(
            "onevision", ["layers.2", "norm"], {"preload_module_classes": ["Qwen2DecoderLayer"]}, marks=nested
        ),
    ],
    ids=["k on disk", "k - 1 on disk as a whole"],
)
def test_the_released_answer_comes_out(kind, on_disk, options, tmp_path, pixels):
    model = spread(kind, tmp_path, on_disk, **options)
    state = {name: weight.device for name, weight in model.state_dict().items()}
    text = torch.tensor([[5, 6, 7]])
    before = model(text).logits
    earlytom(model, META["retain_ratio"], **golden_settings(META))
    output = {"return_dict_in_generate": True, "output_logits": True}
    answer = model.generate(**question(model, META["prompt"], pixels), max_new_tokens=8, do_sample=False, **output)
    torch.testing.assert_close(answer.logits[0][0], CASE["first_logits"], atol=1e-3, rtol=0)
    assert answer.sequences[0, -8:].tolist() == CASE["generated"].tolist()
    shared = model.generate.func.__self__.shared
    assert shared.same_weights(model) and shared.language.model.layers[2].self_attn is not None
    restore(model)
    assert {name: weight.device for name, weight in model.state_dict().items()} == state, "offloaded again"
    assert torch.equal(model(text).logits, before)


@pytest.mark.parametrize("module", ["model.vision_tower", "model.mm_projector"])
def test_a_vision_part_that_is_offloaded_is_refused(module, tmp_path):
    model = spread("stand_in", tmp_path, [module])
    with pytest.raises(InputError, match=r"vision tower, projector and newline of .* not offloaded \(meta\)"):
        earlytom(model, environ={})
    assert "generate" not in model.__dict__


def test_several_devices_without_hooks_are_refused():
    model = load_stand_in(TINY)
    model.model.layers[2].to("meta")
    with pytest.raises(InputError, match="are on cpu and meta, without accelerate's hooks"):
        earlytom(model, environ={})
