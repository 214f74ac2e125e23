"""Reading the tensors that are asked for, one at a time; a value that is not finite is an error here, not an answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .keys import Slot

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what a model can be loaded in


def read_tensors(
    directory: Path,
    files: Mapping[str, str],
    found: Mapping[Slot, str],
    dtype: torch.dtype,
    device: Callable[[Slot], torch.device],
    keep: Callable[[Slot, Tensor], Tensor] = lambda slot, tensor: tensor,
) -> dict[Slot, Tensor]:
    """The tensors of `found` (slot -> stored name), read one at a time, cast to `dtype` and moved to their `device`.

    files: stored name -> file; keep: what to hold on to of a tensor that was read. Raises CheckpointError, also on a
    tensor that holds, or becomes in `dtype`, what is not finite.
    """
    by_file: dict[str, list[tuple[Slot, str]]] = defaultdict(list)
    for slot, key in found.items():
        by_file[files[key]].append((slot, key))
    tensors = {}
    for file, items in by_file.items():
        try:
            with safe_open(directory / file, framework="pt", device="cpu") as shard:
                for slot, key in items:  # a copy: what safe_open gives is a view of the mapped file
                    stored = shard.get_tensor(key)
                    tensor = stored.to(device=device(slot), dtype=dtype, copy=True)
                    if not _finite(tensor):
                        raise CheckpointError(_what_is_not_finite(directory / file, key, stored, dtype))
                    tensors[slot] = keep(slot, tensor)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{directory / file} cannot be read: {error}") from None
    return tensors


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass without a copy: NaN passes through aminmax, and nothing overflows."""
    if not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _what_is_not_finite(path: Path, key: str, stored: Tensor, dtype: torch.dtype) -> str:
    """One sentence on a tensor that is not finite in `dtype`: it was stored so, or a smaller range makes it so."""
    if not _finite(stored):
        wrong = ~stored.isfinite()
        at = wrong.nonzero()[0].tolist()
        return (
            f"{path}: {int(wrong.sum())} of the {stored.numel()} values of {key} are not finite (the first, at {at}, "
            f"is {stored[tuple(at)].item()}): the checkpoint is damaged or its training diverged"
        )
    largest = stored.abs().max().item()
    fitting = [str(d).removeprefix("torch.") for d in DTYPES if largest <= torch.finfo(d).max]
    overflow = int((~stored.to(dtype).isfinite()).sum())
    return (
        f"{path}: {overflow} of the {stored.numel()} values of {key} overflow {str(dtype).removeprefix('torch.')} (the "
        f"largest is {largest:.4g}, the limit {torch.finfo(dtype).max:.4g}); what holds them is {' or '.join(fitting)}"
    )
