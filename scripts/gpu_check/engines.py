"""Engines for `gpu_check`: built where their product is here, opened where the card takes them, looked into."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from earlytom.errors import EngineError
from engines.bundle.manifest import EngineRecord

from .journal import Skip
from .workshop import Variant, Workshop

TRT, RTX = "tensorrt", "tensorrt-rtx"
_TRIAL = """import sys, torch
from engines.bundle.reader import read_bundle
from engines.runner import OpenOptions
from engines.tensorrt.runner import open_bundle
runner = open_bundle(sys.argv[2], read_bundle(sys.argv[1], check=False), OpenOptions())
(spec,) = runner.inputs
runner.run(torch.zeros(spec.shape, dtype=torch.uint8, device="cuda"))
torch.cuda.synchronize()
"""


class Engines:
    """The engines of the shop's bundles."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop

    def built(self, product: str, variant: Variant) -> tuple[EngineRecord, float]:
        from engines.cards import current_card
        from engines.products import product_of
        from engines.tensorrt.build import probe_build

        try:
            probe_build(product)
        except EngineError as error:
            raise Skip(str(error)) from None
        held = [r for r in self.shop.bundle(variant).manifest.engines if r.product == product]
        if held:
            return held[0], 0.0
        if product == TRT:
            return self.shop.build(variant, product, timing_cache=self.shop.folder / "timing")
        card, offered = current_card(), product_of(product).targets
        target = card.target if card is not None and card.target in offered else "sm80"
        return self.shop.build(variant, product, targets=(target,))

    def opened(self, product: str, variant: Variant, record: EngineRecord) -> Any:
        """The runner. A card that TensorRT for RTX has no target for is tried all the same: we built the engine."""
        from engines.cards import current_card, show_targets

        card = current_card()
        if card is None or self.shop.device.type != "cuda":
            raise Skip(f"the engine is built, for {show_targets(record.targets)}; this machine has no CUDA device")
        if card.target not in record.targets and product == RTX:
            self.shop.put(variant, replace(record, targets=(*record.targets, card.target)))
            self._try_apart(product, variant, card.target)
        return self.shop.runner(variant, product)

    def _try_apart(self, product: str, variant: Variant, target: str) -> None:
        """Run the engine once in a process of its own, which it may take with it. Raises Skip when that fails."""
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL, str(self.shop.bundle(variant).path), product], capture_output=True,
            text=True, check=False, cwd=Path(__file__).parents[2],
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise Skip(f"{product} offers no {target}; an engine for another card was tried on it: {lines[-1][:400]}")

    def kernels(self, product: str, variant: Variant) -> dict[str, Any]:
        """What the inspector says of attention and types."""
        from engines.products import import_product
        from engines.tensorrt.inspect import inspect_engine

        engine = getattr(self.shop.runner(variant, product), "engine", None)
        try:
            found = inspect_engine(import_product(product), engine, self.shop.bundle(variant).manifest)
        except Exception as error:  # what is asked of a library in passing must not lose the measurement
            return {"warnings": [f"the engine could not be inspected: {error}"]}
        return asdict(found.inspection())

    def facts(self, variant: Variant, record: EngineRecord) -> dict[str, Any]:
        size = self.shop.bundle(variant).manifest.files[record.file].bytes
        return {"file": record.file, "version": record.version, "targets": list(record.targets), "bytes": size,
                "export_seconds": round(self.shop.learned.get("export", 0), 2)}
