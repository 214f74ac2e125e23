"""What a measurement was taken on: card, driver, clocks, versions of everything that took part."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..cards import current_card

PACKAGES = (
    "earlytom-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "polygraphy", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt_cu13_bindings", "tensorrt-rtx",
    "numpy", "av", "pillow", "triton",
)
_QUERY = {
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "sm_max_mhz", "power.draw": "watts",
    "power.limit": "watts_limit", "temperature.gpu": "celsius", "clocks_throttle_reasons.active": "throttled",
    "utilization.gpu": "utilization",
}


def versions() -> dict[str, str]:
    """Of the packages that are here; one that is imported from a directory may not be known."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # which says what it was built for


def commit() -> str:
    """The commit that this package runs from, with a + where files were changed; "" outside of a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a package that lies in somebody else's repository
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def describe_machine() -> dict[str, Any]:
    """Plain JSON: card (None without one), its memory, driver, CUDA of torch and driver, processor, versions."""
    card = current_card() if not torch.cuda.is_available() else current_card(torch.cuda.current_device())
    found: dict[str, Any] = {
        "card": None, "system": platform.platform(), "processor": _processor(), "cores": os.cpu_count(),
        "torch_cuda": torch.version.cuda, "versions": versions(),
    }
    if card is not None:
        found |= {"card": card.name, "target": card.target, "driver": card.driver, "driver_cuda": card.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["multiprocessors"] = properties.multi_processor_count
        found["driver"] = found.get("driver") or clocks("driver_version").get("driver_version")
    return found


def clocks(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of torch's current card at this moment: clocks, power, temperature; {} without one."""
    if not torch.cuda.is_available():
        return {}
    wanted = fields or tuple(_QUERY)
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={_card_name()}", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return {_QUERY.get(name, name): value for name, value in zip(wanted, values)}


def _card_name() -> str:
    """For nvidia-smi, which counts cards as they are plugged in, where CUDA counts the visible, the fastest first."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
