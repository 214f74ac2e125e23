"""LLaVA-NeXT's own LlavaQwenForCausalLM with EarlyTom; test_transformers.py runs this where that package can be had.

Of the package nothing is replaced but where its tower's weights come from, a hub id: here a directory of the tests.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from earlytom import earlytom, restore
from tests.bundles import GOLDEN_CONFIG, golden_bundle
from tests.cases import GOLDEN, TINY, cases, golden_settings
from tests.onevision import expand, load_onevision

E2E = cases("e2e/e2e")


@pytest.fixture(scope="module")
def model() -> Any:
    sys.path.insert(0, os.environ["LLAVA_NEXT"])
    package = types.ModuleType("llava")  # its __init__.py imports a model of every family
    package.__path__ = [str(Path(os.environ["LLAVA_NEXT"], "llava"))]
    sys.modules["llava"] = package
    encoder = importlib.import_module("llava.model.multimodal_encoder.siglip_encoder")
    llava = importlib.import_module("llava.model.language_model.llava_qwen")
    settings = json.loads((TINY / "config.json").read_text())
    read = encoder.SigLipVisionModel.from_pretrained.__func__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            encoder.SigLipVisionModel, "from_pretrained",
            classmethod(lambda cls, name, **_: read(cls, TINY / name)),
        )
        made = llava.LlavaQwenForCausalLM(llava.LlavaQwenConfig(**settings))
    missing, unexpected = made.load_state_dict(load_file(TINY / "model.safetensors"), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return made.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def plain(model: Any) -> Any:
    yield
    restore(model)


def ask(model: Any, prompt: list[int], pixels: Tensor) -> tuple[list[int], Tensor]:
    """The new ids, and the logits [new, vocabulary] that they were chosen by."""
    answer = model.generate(
        torch.tensor([prompt]), images=[pixels], image_sizes=[(384, 384)], modalities=["video"], do_sample=False,
        max_new_tokens=8, return_dict_in_generate=True, output_logits=True,
    )
    return answer.sequences[0].tolist(), torch.cat(answer.logits)


@pytest.mark.parametrize("case", E2E, ids=str)
def test_the_released_answers(case: Any, model: Any, pixels: Tensor) -> None:
    earlytom(model, case.meta["retain_ratio"], **golden_settings(case.meta))
    torch.testing.assert_close(model.generate.func.__self__.encode(pixels), case["visual"], atol=1e-4, rtol=0)
    ids, logits = ask(model, case.meta["prompt"], pixels)
    torch.testing.assert_close(logits[0], case["first_logits"], atol=1e-3, rtol=0)
    assert ids == case["generated"].tolist()


@pytest.mark.parametrize("case", [case for case in E2E if case.meta["inner_layer"]], ids=str)
def test_the_published_figures_merging(case: Any, model: Any, pixels: Tensor) -> None:
    """As the released class does it under SDPA, see InnerMerging.as_released."""
    earlytom(model, case.meta["retain_ratio"], **golden_settings(case.meta, as_released=True))
    ids, logits = ask(model, case.meta["prompt"], pixels)
    with np.load(GOLDEN / "e2e" / "as_released.npz") as archive:
        np.testing.assert_allclose(logits, archive[f"{case.number}_logits"], rtol=0, atol=1e-3)
        assert ids == archive[f"{case.number}_generated"].tolist()


def test_a_bundle_in_place_of_its_tower(model: Any, pixels: Tensor) -> None:
    prompt = E2E[0].meta["prompt"]
    ids, logits = ask(earlytom(model, config=GOLDEN_CONFIG), prompt, pixels)
    found, found_logits = ask(earlytom(model, bundle=golden_bundle("fp32").path, engine="onnxruntime"), prompt, pixels)
    assert found == ids
    torch.testing.assert_close(found_logits, logits, atol=1e-3, rtol=0)


def test_unpruned_and_restored_it_is_itself(model: Any, pixels: Tensor) -> None:
    """With everything kept EarlyTom changes nothing of its answer; transformers' model of the same weights agrees."""
    prompt = E2E[0].meta["prompt"]
    own, own_logits = ask(model, prompt, pixels)
    whole = GOLDEN_CONFIG.replace(retain=1.0, merge_layers=(), frame_budgets=(), inner=None)
    ids, logits = ask(earlytom(model, config=whole), prompt, pixels)
    assert ids == own
    torch.testing.assert_close(logits, own_logits, atol=1e-3, rtol=0)
    assert ask(restore(model), prompt, pixels)[0] == own
    other = earlytom(load_onevision(TINY), config=whole)
    answer = other.generate(
        input_ids=expand(prompt, 32), pixel_values_videos=pixels[None], max_new_tokens=8, do_sample=False
    )
    assert answer[0, -8:].tolist() == own
