"""Reading the tensors that are asked for, one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .keys import Slot


def read_tensors(
    directory: Path, files: Mapping[str, str], found: Mapping[Slot, str], dtype: torch.dtype, device: torch.device
) -> dict[Slot, Tensor]:
    """The tensors of `found` (slot -> stored name), read one at a time, cast to `dtype` and moved to `device`.

    files: stored name -> file. Raises CheckpointError.
    """
    by_file: dict[str, list[tuple[Slot, str]]] = defaultdict(list)
    for slot, key in found.items():
        by_file[files[key]].append((slot, key))
    tensors = {}
    for file, items in by_file.items():
        try:
            with safe_open(directory / file, framework="pt", device="cpu") as shard:
                for slot, key in items:  # a copy: what safe_open gives is a view of the mapped file
                    tensors[slot] = shard.get_tensor(key).to(device=device, dtype=dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{directory / file} cannot be read: {error}") from None
    return tensors
