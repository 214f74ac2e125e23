"""NVIDIA cards: the names that people use, their compute capabilities, and the card in this machine."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = {
    "sm70": "v100", "sm75": "t4 rtx2060 rtx2070 rtx2080 rtx2080ti rtx5000 rtx8000",
    "sm80": "a100 a10040gb a10080gb a10080gbpcie a30 a800",
    "sm86": "a10 a10g a16 a2 a40 a2000 a4000 a4500 a5000 a6000 rtxa2000 rtxa4000 rtxa4500 rtxa5000 rtxa6000 "
            "rtx3050 rtx3060 rtx3060ti rtx3070 rtx3070ti rtx3080 rtx3080ti rtx3090 rtx3090ti",
    "sm87": "orin agxorin", "sm89": "l4 l20 l40 l40s rtx4050 rtx4060 rtx4060ti rtx4070 rtx4070ti rtx4080 rtx4090 "
                                    "rtx4090d rtx6000ada rtx5000ada rtx4000ada",
    "sm90": "h20 h100 h100pcie h200 h800 gh200", "sm100": "b100 b200 gb200", "sm103": "b300 gb300",
    "sm110": "thor agxthor",
    "sm120": "rtx5050 rtx5060 rtx5060ti rtx5070 rtx5070ti rtx5080 rtx5090 rtx5090d rtxpro6000 rtxpro5000",
    "sm121": "gb10 dgxspark",
}
CARDS = {name: target for target, names in _NAMES.items() for name in names.split()}
WELL_KNOWN = {
    "sm70": "V100", "sm75": "T4", "sm80": "A100", "sm86": "A10, RTX 3090", "sm87": "Orin", "sm89": "L40, RTX 4090",
    "sm90": "H100, H200", "sm100": "B200", "sm103": "B300", "sm110": "Thor", "sm120": "RTX 5090", "sm121": "DGX Spark",
}


def card_key(name: str) -> str:
    """A card's name as CARDS has it: "NVIDIA A100", "Tesla T4", "rtx-4090" -> "a100", "t4", "rtx4090"."""
    return re.sub(r"nvidia|geforce|tesla|quadro|[\s_-]", "", name.lower())


def sort_targets(targets: Any) -> tuple[str, ...]:
    return tuple(sorted(set(targets), key=lambda target: int(target.removeprefix("sm"))))


@dataclass(frozen=True)
class Card:
    """A GPU as its driver describes it. target: "sm80"; driver: release such as "580.95.05", or None where not told;
    cuda: newest version of CUDA that the driver runs, "13.0"."""

    name: str
    target: str
    driver: str | None
    cuda: str

    @property
    def file_part(self) -> str:
        """Model and compute capability as part of a file's name: "nvidia-a100-sxm4-80gb.sm80"."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}.{self.target}"


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


def show_targets(targets: Iterable[str]) -> str:
    """Compute capabilities with cards that people know: "sm80 (A100), sm86 (A10, RTX 3090)"."""
    return ", ".join(f"{t} ({WELL_KNOWN[t]})" if t in WELL_KNOWN else t for t in targets)
