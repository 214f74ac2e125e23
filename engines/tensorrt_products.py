"""Two products with nearly one Python API, TensorRT and TensorRT for RTX: the table of what differs, and the cards.

Nothing is imported here but the standard library, so that a build runs in a process without torch.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlytom.errors import EngineError


@dataclass(frozen=True)
class Product:
    """One of the two. minimum: version that is relied on; attention_since: knows ONNX's Attention operator.

    targets: compute capabilities that it builds for without a card, none when it builds on the card that it builds for;
    timing_cache, hardware_compatibility, version_compatible, strip_weights: what it can, see BuildOptions.
    """

    name: str
    title: str
    module: str
    suffix: str  # of engine files
    install: str
    minimum: tuple[int, int]
    attention_since: tuple[int, int]
    targets: tuple[str, ...] = ()
    timing_cache: bool = False
    hardware_compatibility: bool = False
    version_compatible: bool = False
    strip_weights: bool = False

    @property
    def ahead_of_time(self) -> bool:
        return bool(self.targets)


PRODUCTS = {
    product.name: product
    for product in (
        # Its enumeration has SM75 too, but it does not compile float32 matrix products for Turing, and ours compare
        # frames in float32. Timing caches are no-ops, compatibility levels unsupported; version-compatible engines need
        # a library that its wheel lacks, stripped ones a GPU (all tried with 1.7.1).
        Product("tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx", "rtx", "pip install tensorrt-rtx", (1, 7), (1, 7),
                targets=("sm80", "sm86", "sm89", "sm120", "sm121")),
        Product("tensorrt", "TensorRT", "tensorrt", "trt", "pip install tensorrt", (10, 10), (10, 14),
                timing_cache=True, hardware_compatibility=True, version_compatible=True, strip_weights=True),
    )
}  # fmt: skip

_NAMES = {
    "sm70": "v100", "sm75": "t4 rtx2060 rtx2070 rtx2080 rtx2080ti rtx5000 rtx8000", "sm80": "a100 a30 a800",
    "sm86": "a10 a10g a16 a2 a40 a2000 a4000 a4500 a5000 a6000 rtxa2000 rtxa4000 rtxa4500 rtxa5000 rtxa6000 "
            "rtx3050 rtx3060 rtx3060ti rtx3070 rtx3070ti rtx3080 rtx3080ti rtx3090 rtx3090ti",
    "sm87": "orin agxorin", "sm89": "l4 l20 l40 l40s rtx4050 rtx4060 rtx4060ti rtx4070 rtx4070ti rtx4080 rtx4090 "
                                    "rtx4090d rtx6000ada rtx5000ada rtx4000ada",
    "sm90": "h20 h100 h200 h800 gh200", "sm100": "b100 b200 gb200", "sm103": "b300 gb300", "sm110": "thor agxthor",
    "sm120": "rtx5050 rtx5060 rtx5060ti rtx5070 rtx5070ti rtx5080 rtx5090 rtx5090d rtxpro6000 rtxpro5000",
    "sm121": "gb10 dgxspark",
}  # fmt: skip
CARDS = {name: target for target, names in _NAMES.items() for name in names.split()}


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
        lines = str(error).splitlines() or [type(error).__name__]
        raise EngineError(
            f"the package {product.module} is installed but does not load ({lines[0]}): "
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
        name = re.sub(r"nvidia|geforce|tesla|quadro|[\s_-]", "", part.lower())
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


def sort_targets(targets: Any) -> tuple[str, ...]:
    return tuple(sorted(set(targets), key=lambda target: int(target.removeprefix("sm"))))


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


@dataclass(frozen=True)
class Card:
    """A GPU as its driver describes it. target: "sm80"; driver: release such as "580.95.05", or None where not told;
    cuda: newest version of CUDA that the driver runs, "13.0"."""

    name: str
    target: str
    driver: str | None
    cuda: str


def _driver_library() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def current_card(index: int = 0) -> Card | None:
    """The card with this number among those visible (CUDA_VISIBLE_DEVICES counts), or None; makes no CUDA context."""
    try:
        cuda = _driver_library()
    except OSError:
        return None
    device, value, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index):
        return None
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        capability.append(value.value)
    if cuda.cuDeviceGetName(name, len(name), device) or cuda.cuDriverGetVersion(ctypes.byref(value)):
        return None
    version = f"{value.value // 1000}.{value.value % 1000 // 10}"
    return Card(name.value.decode(errors="replace"), f"sm{capability[0]}{capability[1]}", _driver_release(), version)


def _driver_release() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\d{3,}\.\d+(\.\d+)?", text)
    return found[0] if found else None
