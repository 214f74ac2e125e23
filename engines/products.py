"""The engines: one table of what runs a bundle, and of what differs between TensorRT and TensorRT for RTX.

Nothing is imported here but the standard library, so that a build runs in a process without torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlytom.errors import EngineError, first_line

from .cards import CARDS, card_key, sort_targets

COMPATIBILITY = ("none", "ampere+", "same-cc")  # levels that a TensorRT engine can be built with


@dataclass(frozen=True)
class Engine:
    """What runs a bundle. module: the package it needs, and `install` what gets it; needs_weights: it computes from the
    checkpoint, not from a file. Which file of ours runs it: opening.py."""

    name: str
    title: str
    module: str
    install: str
    needs_weights: bool = False


@dataclass(frozen=True)
class Product(Engine):
    """One of the two that build engine files, which have an API in Python that is nearly the same.

    suffix: of these files; minimum: version that is relied on; attention_since: knows ONNX's Attention operator;
    targets: compute capabilities that it builds for without a card, none when it builds on the card that it builds for;
    timing_cache, hardware_compatibility, version_compatible, strip_weights: what it can, see BuildOptions.
    """

    suffix: str = ""
    minimum: tuple[int, int] = (0, 0)
    attention_since: tuple[int, int] = (0, 0)
    targets: tuple[str, ...] = ()
    timing_cache: bool = False
    hardware_compatibility: bool = False
    version_compatible: bool = False
    strip_weights: bool = False

    @property
    def ahead_of_time(self) -> bool:
        return bool(self.targets)


# In the order of preference, of opening a bundle as well as of what an export builds by itself.
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Product(
            "tensorrt", "TensorRT", "tensorrt", "pip install tensorrt",
            suffix="trt", minimum=(10, 10), attention_since=(10, 14),
            timing_cache=True, hardware_compatibility=True, version_compatible=True, strip_weights=True,
        ),
        # Its enumeration has SM75 too, but it does not compile float32 matrix products for Turing, and ours compare
        # frames in float32. Timing caches are no-ops, compatibility levels unsupported; version-compatible engines need
        # a library that its wheel lacks, stripped ones a GPU (all tried with 1.7.1).
        Product(
            "tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx", "pip install tensorrt-rtx",
            suffix="rtx", minimum=(1, 7), attention_since=(1, 7), targets=("sm80", "sm86", "sm89", "sm120", "sm121"),
        ),
        Engine("onnxruntime", "ONNX Runtime", "onnxruntime", "pip install onnxruntime"),
        Engine("torch", "PyTorch", "torch", "pip install torch", needs_weights=True),
    )
}
PRODUCTS = {name: engine for name, engine in ENGINES.items() if isinstance(engine, Product)}


def build_command(bundle: Path, engine: str, *options: str) -> str:
    """The command that adds an engine to a bundle, for messages that say so."""
    return shlex.join(["earlytom-build", str(bundle), "--engine", engine, *options])


def product_of(name: str) -> Product:
    if name not in PRODUCTS:
        raise EngineError(f"there is no TensorRT product {name!r}, it must be one of {', '.join(PRODUCTS)}")
    return PRODUCTS[name]


def is_installed(name: str) -> bool:
    """Whether the package is there; it may still not load."""
    return importlib.util.find_spec(product_of(name).module) is not None


def import_product(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises EngineError: one sentence on what is missing, how to get it."""
    product = product_of(name)
    if not is_installed(name):
        also = "" if product.ahead_of_time else ", or pip install tensorrt-rtx, which builds without a GPU"
        raise EngineError(f"{product.title} is not installed: {product.install}{also}")
    try:
        module = importlib.import_module(product.module)
        version = module_version(module)
    except Exception as error:  # its libraries may be missing, or of another version
        raise EngineError(
            f"the package {product.module} is installed but does not load ({first_line(error)}): "
            f"{product.install.replace('install', 'install --force-reinstall')}"
        ) from error
    if version < product.minimum:
        raise EngineError(
            f"{product.title} {module.__version__} is too old, {'.'.join(map(str, product.minimum))} or newer is "
            f"needed: {product.install.replace('install', 'install --upgrade')}"
        )
    return module


def module_version(module: Any) -> tuple[int, int]:
    """Major and minor version of an imported product."""
    parts = re.findall(r"\d+", module.__version__)
    return int(parts[0]), int(parts[1])


def parse_targets(text: str | None, product: str = "tensorrt-rtx") -> tuple[str, ...]:
    """What to build for: "a100,rtx4090" or "sm80,sm89" -> ("sm80", "sm89"), sorted; None: all that the product can.

    TensorRT itself builds for the card in the machine: None is () for it, and the build fills it in. Raises EngineError
    for a card that is not known or not offered.
    """
    known = product_of(product)
    if text is None:
        return known.targets
    found = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        name = card_key(part)
        target = name if re.fullmatch(r"sm\d{2,3}", name) else CARDS.get(name)
        if target is None:
            raise EngineError(
                f"the card {part!r} is not known: give its compute capability, such as sm80, or a name such as a100, "
                "a10, rtx3090, l40, rtx4090, h100, rtx5090"
            )
        check_target(known, target, part)
        found.add(target)
    if not found:
        raise EngineError(f"{text!r} names no card: give names or compute capabilities, such as a100,rtx4090")
    return sort_targets(found)


def check_target(product: Product, target: str, asked: str = "") -> None:
    """Raise EngineError when `product` builds ahead of time, but not for this compute capability."""
    if not product.ahead_of_time or target in product.targets:
        return
    what = target if asked.lower() in ("", target) else f"{asked} ({target})"
    why = ", which cannot multiply in float32 with it" if target == "sm75" else ""
    raise EngineError(
        f"{product.title} does not build for {what} ahead of time{why}: it offers {', '.join(product.targets)}; on a "
        "machine with that card, --engine tensorrt builds for it"
    )
