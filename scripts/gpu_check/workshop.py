"""What `gpu_check` measures on: full-size towers with random weights, clips, graphs, engines, made when asked for.

Latency does not depend on the weights, and nothing can be fetched where the check has to run. The weights of all dtypes
and graphs are those of one float32 tower, rounded, so that answers can be compared.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from earlytom.checkpoint.random_weights import random_vision
from earlytom.config import EarlyTomConfig
from earlytom.dtypes import torch_dtype
from earlytom.flops import unpruned_config
from earlytom.tower import StaticTower
from earlytom.video.clips import synthetic_clip
from earlytom.vision.geometry import VisionGeometry
from earlytom.vision.siglip import Vision
from engines.bundle.manifest import MODEL, EngineRecord, Manifest
from engines.bundle.reader import Bundle
from engines.bundle.writer import BundleWriter, update_bundle
from engines.opening import open_runner
from export.onnx.exporter import ATTENTION_OPSET, DEFAULT_OPSET, export_tower

if TYPE_CHECKING:
    from engines.runner import Runner

QUICK = VisionGeometry(84, 14, 32, 2, 48, 4, projector_size=24)
QUICK_CONFIG = EarlyTomConfig(retain=0.3, frames=12, merge_layers=(0, 1, 3), frame_budgets=(10, 8, 6))


@dataclass(frozen=True)
class Variant:
    """One tower as a graph: dtype "fp16", LLM width, with EarlyTom or without, opset."""

    dtype: str
    width: int
    pruned: bool = True
    opset: int = DEFAULT_OPSET

    def __str__(self) -> str:
        parts = [self.dtype, f"width {self.width}", *([] if self.pruned else ["unpruned"])]
        return ", ".join(parts + ([f"opset {self.opset}"] if self.opset >= ATTENTION_OPSET else []))

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.width}{'' if self.pruned else '-unpruned'}-opset{self.opset}"


class Workshop:
    """Towers, graphs and engines in `folder`. learned: seconds that each kind of work took here, by name.

    tick: called between steps of a build, to stop it by raising.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, quick: bool = False, tick: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder, self.device, self.quick, self.tick = folder, device, quick, tick
        self.config = QUICK_CONFIG if quick else EarlyTomConfig(retain=0.2)
        self.learned: dict[str, float] = {}
        self.bundles: dict[Variant, Bundle] = {}
        self._clips: list[Tensor] = []
        self.vision = lru_cache(maxsize=2)(self._vision)  # of one width at a time, in two dtypes
        self.runners: dict[tuple[Variant, str, bool], Runner] = {}

    @property
    def clip(self) -> Tensor:
        """uint8 [1, T, H, W, 3] on the device."""
        return self.clips(1)[0]

    def clips(self, count: int) -> tuple[Tensor, ...]:
        for seed in range(len(self._clips), count):
            clip = synthetic_clip(self.config.frames, self.geometry(0).image_size, seed=seed)
            self._clips.append(torch.from_numpy(clip)[None].to(self.device))
        return tuple(self._clips[:count])

    def geometry(self, width: int) -> VisionGeometry:
        base = QUICK if self.quick else VisionGeometry()
        return replace(base, projector_size=width or base.projector_size)

    def config_of(self, variant: Variant) -> EarlyTomConfig:
        return self.config if variant.pruned else unpruned_config(self.config)

    def tower(self, variant: Variant, *, attention: str = "fused") -> StaticTower:
        vision = self.vision(variant.dtype, variant.width)
        return StaticTower(vision, self.config_of(variant), attention=attention).eval()

    def _vision(self, dtype: str, width: int) -> Vision:
        start = time.perf_counter()
        vision = random_vision(self.geometry(width), self.device).to(torch_dtype(dtype))
        self.learned["weights"] = time.perf_counter() - start
        return vision

    def bundle(self, variant: Variant) -> Bundle:
        """The variant's graph in a bundle. Raises ExportError, ImportError where the exporter is not installed."""
        if variant not in self.bundles:
            for package in ("onnx", "onnx_ir", "onnxscript"):  # say which is missing, not that tracing failed
                importlib.import_module(package)

            self.tick(f"export {variant}")
            start, config, geometry = time.perf_counter(), self.config_of(variant), self.geometry(variant.width)
            vision = random_vision(geometry, self.device).to(torch_dtype(variant.dtype)).cpu()
            with BundleWriter(self.folder / variant.name) as writer:
                exported = export_tower(
                    StaticTower(vision, config).eval(), writer.path / MODEL, opset=variant.opset, progress=self.tick
                )
                manifest = Manifest.derive(
                    config, geometry, dtype=variant.dtype, opset=variant.opset,
                    attention=exported.attention,
                    checkpoint={"name": "random", "format": "random", "digest": hashlib.sha256(b"0").hexdigest()},
                    tools={}, traced=exported.traced,
                )
                self.bundles[variant] = writer.commit(manifest)
            self.learned["export"] = time.perf_counter() - start
        return self.bundles[variant]

    def build(self, variant: Variant, product: str, **options: Any) -> tuple[EngineRecord, float]:
        """Build an engine and put it into the variant's bundle: its record, and the seconds of the build alone."""
        from engines.tensorrt.build import BuildOptions, build_engine

        bundle = self.bundle(variant)
        folder = self.folder / f"{variant.name}.build"
        folder.mkdir(exist_ok=True)
        start = time.perf_counter()
        record = build_engine(
            bundle.path / MODEL, bundle.manifest, folder, BuildOptions(product=product, **options), progress=self.tick
        )
        seconds = time.perf_counter() - start
        self.learned[f"build {product}"] = seconds
        self.put(variant, record, folder / record.file)
        (folder / record.file).unlink()
        return record, seconds

    def put(self, variant: Variant, record: EngineRecord, file: Path | None = None) -> None:
        """List the engine in the variant's bundle, with its file, or anew."""
        add = {record.file: file} if file is not None else {}
        self.bundles[variant] = update_bundle(self.bundle(variant), add=add, engines=[record])

    def runner(self, variant: Variant, engine: str, *, cuda_graph: bool = True) -> Runner:
        """The engine of the variant's bundle, opened once and kept open. Raises EngineError where it cannot run."""
        key = (variant, engine, cuda_graph)
        if key not in self.runners:
            self.tick(f"open {engine}, {variant}")
            bundle = self.bundle(variant)
            start = time.perf_counter()
            self.runners[key] = open_runner(bundle, engine, cuda_graph=cuda_graph)
            self.learned[f"open {engine}"] = time.perf_counter() - start
        return self.runners[key]

    def release(self, keep: Callable[[Variant], bool]) -> None:
        """Close the engines of all other variants, and give their memory back."""
        for key in [key for key in self.runners if not keep(key[0])]:
            self.runners.pop(key).close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self.release(lambda variant: False)
        self.vision.cache_clear()
