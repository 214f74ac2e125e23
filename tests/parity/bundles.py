"""Bundles of small towers, exported once for all tests that need one."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from earlytom.config import EarlyTomConfig
from earlytom.dtypes import torch_dtype
from earlytom.tower import StaticTower
from earlytom.vision.siglip import Vision
from engines.bundle.manifest import MODEL, Manifest
from engines.bundle.reader import Bundle
from engines.bundle.writer import BundleWriter
from export.onnx.exporter import DEFAULT_OPSET, export_tower
from tests.cases import small_config, small_vision

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
        )  # fmt: skip
        return writer.commit(manifest)


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="earlytom-tests-")  # removed with the process


def small_bundle(dtype: str = "fp32", batch: int = 1) -> Bundle:
    """The tower of `small_vision()` with `small_config()`; do not write into it."""
    return _small_bundle(dtype, batch)


@functools.cache
def _small_bundle(dtype: str, batch: int) -> Bundle:
    output = Path(_home().name) / f"small-{dtype}-{batch}"
    return write_bundle(output, small_vision(), small_config(), dtype=dtype, batch=batch)


def copy_bundle(bundle: Bundle, output: Path) -> Bundle:
    """The same bundle elsewhere, to be spoilt."""
    shutil.copytree(bundle.path, output)
    return Bundle(output, bundle.manifest)
