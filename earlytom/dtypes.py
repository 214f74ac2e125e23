"""The floating-point types a tower can have: one table, which everything that names or measures them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """name: on the command line and in manifests; torch, onnx, tensorrt: the same there; bytes: of one number."""

    name: str
    torch: str
    onnx: str
    tensorrt: str
    bytes: int


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("fp32", "float32", "FLOAT", "FLOAT", 4),
        DType("fp16", "float16", "FLOAT16", "HALF", 2),
        DType("bf16", "bfloat16", "BFLOAT16", "BF16", 2),
    )
}


def check_dtype(name: str) -> DType:
    """The row of this name. Raises ConfigError when there is none."""
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}, it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of "fp32", "fp16" or "bf16". Raises ConfigError."""
    import torch  # here alone: the table is read where torch is not wanted

    dtype: torch.dtype = getattr(torch, check_dtype(name).torch)
    return dtype
