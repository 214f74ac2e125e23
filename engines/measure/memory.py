"""What a piece of work needs of memory on top of what is held when it starts.

On a card it is what PyTorch's allocator had at most, so an engine's own memory is not in it. On a CPU it is the growth
of the process: the kernel's high-water mark (VmHWM), set back first, less what was resident (VmRSS). Freed memory that
the C library keeps is given back before, so that work which could reuse it does not look free. Where the kernel has no
such mark, nothing is said.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class Memory:
    """`start`, work, `growth`: bytes, or None where it cannot be told."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._before: int | None = None

    def start(self) -> None:
        """On a CPU this makes the work after it slower: pages have to be faulted in again."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        self._before = None
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def growth(self) -> int | None:
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        peak = _status("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _status(name: str) -> int | None:
    """Bytes of a line of /proc/self/status, or None where there is none."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
