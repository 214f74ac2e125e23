"""`earlytom(model, bundle=...)`: a bundle's engine in place of a live model's tower, the same answers, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom import earlytom, restore
from earlytom.bundled import to_frames
from earlytom.errors import ConfigError, EngineError, InputError
from engines.bundle.manifest import Manifest
from engines.bundle.reader import Bundle
from tests.bundles import GOLDEN_CONFIG, IDENTITY, golden_bundle, small_bundle
from tests.cases import TINY, cases, own_videos, small_config, small_vision
from tests.llava_next import load_stand_in
from tests.onevision import load_onevision, question

PROMPT = cases("e2e/e2e")[0].meta["prompt"]
LOADERS: dict[str, Callable[..., Any]] = {"stand_in": load_stand_in, "onevision": load_onevision}


@pytest.fixture(scope="module", params=LOADERS)
def model(request: pytest.FixtureRequest) -> Any:
    return LOADERS[request.param](TINY)


@pytest.fixture(autouse=True)
def plain(request: pytest.FixtureRequest) -> Any:
    yield
    if "model" in request.fixturenames:
        restore(request.getfixturevalue("model"))


def ask(model: Any, pixels: Tensor) -> tuple[list[int], Tensor]:
    """The new ids, and the logits of the first."""
    given = question(model, PROMPT, pixels)
    options = {"return_dict_in_generate": True, "output_logits": True}
    answer = model.generate(**given, max_new_tokens=8, do_sample=False, **options)
    return answer.sequences[0, -8:].tolist(), answer.logits[0][0]


def test_the_engine_answers_as_the_static_tower(model: Any, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, logits = ask(earlytom(model, config=GOLDEN_CONFIG), pixels)
    wrapped = earlytom(model, bundle=golden_bundle("fp32").path, engine="onnxruntime")
    encoder, calls = wrapped.generate.func.__self__.encoder, []
    run = encoder.engine.runner.run
    monkeypatch.setattr(encoder.engine.runner, "run", lambda frames: calls.append(frames.shape) or run(frames))
    found, found_logits = ask(wrapped, pixels)
    assert found == ids and calls == [(1, 32, 384, 384, 3)]
    torch.testing.assert_close(found_logits, logits, atol=1e-3, rtol=0)
    copied = copy.deepcopy(wrapped)
    assert ask(copied, pixels)[0] == ids and len(calls) == 2, "a copy shares the engine"


@own_videos
def test_restoring_closes_the_engine(model: Any, pixels: Tensor) -> None:
    own = ask(model, pixels)[0]
    earlytom(model, bundle=golden_bundle("fp32").path, engine="onnxruntime")
    encoder = model.generate.func.__self__.encoder
    assert ask(restore(model), pixels)[0] == own
    with pytest.raises(EngineError):
        encoder.encode(pixels, torch.zeros(64))


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"retain": 0.2}, ConfigError, "has its own configuration"),
        ({"config": GOLDEN_CONFIG}, ConfigError, "has its own configuration"),
        ({"tau": 0.5}, ConfigError, "has its own configuration"),
        ({"engine": "abacus"}, EngineError, "no engine 'abacus'"),
    ],
    ids=str,
)
def test_contradictions_are_refused(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    model = load_stand_in(TINY)
    with pytest.raises(error, match=says):
        earlytom(model, bundle=golden_bundle("fp32").path, **settings)
    assert not {"generate", "forward"} & set(model.__dict__)


def test_another_bundle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="of another tower than the model's: it has geometry"):
        earlytom(load_stand_in(TINY), bundle=small_bundle().path)
    manifest = Manifest.derive(
        small_config(), small_vision().geometry, dtype="fp32", batch=2, opset=20, attention="primitives",
        checkpoint=IDENTITY, tools={},
    )
    pair = Bundle(Path("pair"), manifest)
    monkeypatch.setattr("engines.live.read_bundle", lambda path: pair)
    with pytest.raises(ConfigError, match="the bundle pair takes 2 videos a call"):
        earlytom(load_stand_in(TINY), bundle="pair")


def test_other_weights_and_other_pixels_are_refused(pixels: Tensor) -> None:
    model = earlytom(load_stand_in(TINY), bundle=golden_bundle("fp32").path, engine="onnxruntime")
    with pytest.raises(InputError, match=r"a video has 8 frames and the bundle .* takes 32"):
        ask(model, pixels[:8])
    with pytest.raises(InputError, match="no frames of 8 bits"):
        ask(model, pixels * 0.99)
    with torch.no_grad():
        model.model.image_newline += 0.1
    with pytest.raises(InputError, match="exported from other weights"):
        ask(model, pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pixels_of_any_dtype_are_the_frames_they_were(dtype: torch.dtype) -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 48, 1).expand(1, 16, 48, 3)
    pixels = ((frames.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).to(dtype)
    assert torch.equal(to_frames(pixels), frames)


@pytest.mark.parametrize("pixels", [torch.zeros(3, 4, 4), torch.zeros(2, 4, 4, 3), torch.zeros(2, 3, 4, 4).long()])
def test_what_no_image_processor_gives_is_refused(pixels: Tensor) -> None:
    with pytest.raises(InputError, match=r"floating point \[T, 3, H, W\]"):
        to_frames(pixels)


@pytest.mark.parametrize("value", [-1.2, 1.1, 0.0])
def test_pixels_of_another_normalisation_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="image processor"):
        to_frames(torch.full((1, 3, 4, 4), value))
