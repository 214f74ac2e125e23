"""Bundles of small towers and of the golden checkpoint, exported once for all tests that need one."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from earlytom.checkpoint import load
from earlytom.config import EarlyTomConfig
from earlytom.dtypes import torch_dtype
from earlytom.tower import StaticTower
from earlytom.vision.siglip import Vision
from engines.bundle.manifest import MODEL, Manifest
from engines.bundle.reader import Bundle, read_bundle
from engines.bundle.writer import BundleWriter
from export.onnx.exporter import DEFAULT_OPSET, export_tower
from tests.cases import TINY, small_config, small_vision
from tests.shared import shared

GOLDEN_CONFIG = EarlyTomConfig(retain=0.2, frames=32, merge_layers=(1, 3, 4), tau=0.5)
IDENTITY = {"name": "small", "format": "demo", "digest": "0" * 64}


def write_bundle(
    output: Path, vision: Vision, config: EarlyTomConfig, *, dtype: str = "fp32", batch: int = 1, **identity: Any
) -> Bundle:
    """What `earlytom-export` writes, without engines and report; `vision` is cast in place."""
    tower = StaticTower(vision.to(torch_dtype(dtype)), config, batch=batch).eval()
    with BundleWriter(output) as writer:
        exported = export_tower(tower, writer.path / MODEL)
        manifest = Manifest.derive(
            config, vision.geometry, dtype=dtype, batch=batch, opset=DEFAULT_OPSET, attention=exported.attention,
            checkpoint=IDENTITY | identity, tools={}, traced=exported.traced,
        )
        return writer.commit(manifest)


def small_bundle(dtype: str = "fp32", batch: int = 1) -> Bundle:
    """The tower of `small_vision()` with `small_config()`, of one merge layer for a batch; do not write into it."""
    return _small_bundle(dtype, batch)


@functools.cache
def _small_bundle(dtype: str, batch: int) -> Bundle:
    def make(output: Path) -> None:
        one = {"merge_layers": (1,), "frame_budgets": (6,)} if batch > 1 else {}
        write_bundle(output, small_vision(), small_config(**one), dtype=dtype, batch=batch)

    return read_bundle(shared(f"small-{dtype}-{batch}", make))


@functools.cache
def golden_vision() -> Vision:
    """The golden checkpoint's tower, float32, at 384 x 384."""
    vision = load(TINY, parts=("vision",)).vision
    assert vision is not None
    return vision


def golden_bundle(dtype: str) -> Bundle:
    """The golden checkpoint's tower with `GOLDEN_CONFIG`; do not write into it."""
    def make(output: Path) -> None:
        vision = load(TINY, parts=("vision",)).vision
        assert vision is not None
        write_bundle(output, vision, GOLDEN_CONFIG, dtype=dtype)

    return read_bundle(shared(f"golden-{dtype}", make))


def copy_bundle(bundle: Bundle, output: Path) -> Bundle:
    """The same bundle elsewhere, to be spoilt."""
    shutil.copytree(bundle.path, output)
    return Bundle(output, bundle.manifest)
