"""The golden archives, a case at a time, and small random towers for tests that need no golden answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from earlytom.config import EarlyTomConfig, InnerMerging
from earlytom.language.versions import FIVE
from earlytom.vision.geometry import VisionGeometry
from earlytom.vision.siglip import Vision

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "e2e" / "tiny-llava-onevision"
five_only = pytest.mark.skipif(not FIVE, reason="needs transformers 5")
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
# A video without an image fails in LlavaOnevision before 4.51, when it is not EarlyTom that takes it.
own_videos = pytest.mark.skipif(RELEASE < (4, 51), reason="transformers before 4.51 cannot")
nested = pytest.mark.skipif(RELEASE < (4, 52), reason="transformers before 4.52 names the modules otherwise")
SEGMENT_SETTINGS = ("tau", "max_window", "ema")


class Case(NamedTuple):
    """One case of an archive: its number, its settings and its arrays as tensors."""

    number: int
    meta: dict[str, Any]
    arrays: dict[str, Tensor]

    def __getitem__(self, name: Any) -> Any:  # type: ignore[override]
        return self.arrays[name]

    def __str__(self) -> str:
        return f"case {self.number}"

    @property
    def segment_settings(self) -> dict[str, Any]:
        return {name: self.meta[name] for name in SEGMENT_SETTINGS}


def cases(name: str) -> list[Case]:
    """All cases of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        metas = json.loads(str(archive["meta"]))
        found: list[dict[str, Tensor]] = [{} for _ in metas]
        for key in archive.files:
            if key != "meta":
                case, array = key.split("_", 1)
                found[int(case)][array] = torch.from_numpy(archive[key])
    return [Case(number, meta, arrays) for number, (meta, arrays) in enumerate(zip(metas, found))]


def golden_settings(meta: dict[str, Any], **inner: Any) -> dict[str, Any]:
    """What `earlytom(model)` takes for an end-to-end case besides its ratio; inner: further ones of InnerMerging."""
    merging = InnerMerging(meta["inner_layer"], meta["inner_ratio"], **inner) if meta["inner_layer"] else None
    return {name: meta[name] for name in SEGMENT_SETTINGS} | {
        "merge_layers": tuple(meta["merge_layers"]), "inner": merging, "environ": {},
    }


def spans(segments: Tensor) -> list[tuple[int, int]]:
    """Segments [n, 2] as the oracle gives them."""
    return [(int(first), int(last)) for first, last in segments]


SMALL = VisionGeometry(
    image_size=84, patch_size=14, hidden_size=32, heads=2, intermediate_size=48, layers=4, projector_size=24
)


def small_vision(
    geometry: VisionGeometry = SMALL, *, pooling: str = "bilinear", newline: str = "one_token", seed: int = 0
) -> Vision:
    """A tower with random weights, large enough that attention is not uniform, features of the order of 1."""
    vision = Vision(geometry, pooling, newline).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in vision.parameters():
        spread = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    for module in vision.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.add_(1)
    return vision


def small_clip(frames: int, *, geometry: VisionGeometry = SMALL, videos: int = 1, seed: int = 0) -> Tensor:
    """uint8 [V, T, H, W, 3]: scenes of a few frames that drift and then cut, so that there is something to merge."""
    generator = torch.Generator().manual_seed(seed)
    size = geometry.image_size
    clips = []
    for _ in range(videos):
        clip, scene = [], None
        for t in range(frames):
            if scene is None or t % 7 == 0:
                scene = torch.rand(size, size, 3, generator=generator)
            noise = torch.rand(size, size, 3, generator=generator)
            share = 0.05 + 0.5 * torch.rand((), generator=generator)
            scene = (1 - share) * scene + share * noise
            clip.append(scene)
        clips.append(torch.stack(clip))
    return (torch.stack(clips) * 255).to(torch.uint8)


def small_config(**changes: Any) -> EarlyTomConfig:
    """Settings that fit SMALL: 12 frames, three merge layers."""
    settings: dict[str, Any] = {
        "retain": 0.3,
        "frames": 12,
        "merge_layers": (0, 1, 3),
        "frame_budgets": (10, 8, 6),
        "tau": 0.5,
    }
    return EarlyTomConfig(**(settings | changes))


class Letters:
    """A tokenizer: a token for each letter."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 60 + 4 for letter in text]}

    def decode(self, ids):
        return " ".join(map(str, ids))
