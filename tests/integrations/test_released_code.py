"""The released code in its own package, on real clips, against `earlytom(model)`: equal ids, logits within 1e-3.

EARLYTOM_CLIPS=5 and EARLYTOM_RATIOS=.25,.20,.15,.10 in the environment ask more than the two clips and ratios of CI.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from earlytom import InnerMerging, earlytom
from tests import clips
from tests.cases import GOLDEN, TINY
from tests.integrations.test_transformers import checkout, environment
from tests.integrations.test_wheel import call
from tests.integrations.test_wheel import wheel as wheel
from tests.llava_next import load_stand_in
from tests.test_layout import ROOT

pytestmark = pytest.mark.integration

SOURCE = "https://github.com/viridisGreen/EarlyTom"
RELEASE = "4.51.3"  # what the golden archives were made with
CLIPS = (("bikes", 0), ("bigbuckbunny", 1), ("carphone", 0), ("bikes", 1), ("bigbuckbunny", 0))  # halves of a file
RATIOS = os.environ.get("EARLYTOM_RATIOS", ".25,.10").split(",")


def frames_of(name: str, half: int) -> Tensor:
    """32 frames uint8 [32, 384, 384, 3] of one half of a real clip."""
    with av.open(str(clips.real(name))) as file:
        frames = [frame.to_image() for frame in file.decode(video=0)]
    frames = frames[half * len(frames) // 2 :][: len(frames) // 2]
    chosen = np.linspace(0, len(frames) - 1, 32).astype(int)
    resized = [frames[i].resize((384, 384), Image.Resampling.BICUBIC) for i in chosen]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized]))


@pytest.fixture(scope="module")
def videos() -> Tensor:
    count = int(os.environ.get("EARLYTOM_CLIPS", "2"))
    return torch.stack([frames_of(*clip) for clip in CLIPS[:count]])


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(RELEASE, wheel, tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout("RELEASED_CODE", SOURCE, tmp_path_factory.mktemp("source"), "the released code is NOT run")


@pytest.mark.parametrize("merging", ["none", "inner"])
def test_the_released_code_answers_the_same(
    merging: str, videos: Tensor, source: Path, python: Path, tmp_path: Path
) -> None:
    """Without merging inside the LLM, and with it as released: under SDPA and without a causal mask (quirk 3)."""
    np.save(tmp_path / "frames.npy", videos.numpy())
    program = ROOT / "tests" / "integrations" / "released_answers.py"
    call(python, program, source, tmp_path / "frames.npy", tmp_path / "out.npz", merging, *RATIOS, cwd=tmp_path)
    with np.load(GOLDEN / "e2e" / "e2e.npz") as archive:
        prompt = torch.tensor([json.loads(str(archive["meta"]))[3]["prompt"]])
    inner = InnerMerging(3, 0.5, as_released=True) if merging == "inner" else None
    model, worst = load_stand_in(TINY), 0.0
    with np.load(tmp_path / "out.npz") as expected:
        for number, clip in enumerate(videos):
            pixels = (clip.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
            for ratio in RATIOS:
                earlytom(
                    model, float(ratio), tau=0.5, max_window=6, ema=0.9, merge_layers=(1, 3, 4), inner=inner, environ={}
                )
                answer = model.generate(
                    prompt, images=[pixels], modalities=["video"], do_sample=False, max_new_tokens=8,
                    return_dict_in_generate=True, output_logits=True,
                )
                where = f"{number}_{ratio}"
                assert answer.sequences[0].tolist() == expected[f"{where}_ids"].tolist()
                error = np.abs(torch.cat(answer.logits).numpy() - expected[f"{where}_logits"]).max()
                worst = max(worst, float(error))
                assert error < 1e-3
    print(f"{len(videos)} clips, ratios {', '.join(RATIOS)}, merging {merging}: logits within {worst:.1e}")
