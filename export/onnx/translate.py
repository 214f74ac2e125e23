"""Operators that torch.onnx does not translate, or not to types that ONNX allows, written in standard operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

BFLOAT16_OPSET = 22  # the first whose Conv and poolings take bfloat16
FLOAT, BFLOAT16 = 1, 16  # ONNX's numbers
CHUNK_ELEMENTS = 1 << 24  # of pairwise differences at once: 64 MiB


def translations(dtype: str, opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """custom_translation_table of torch.onnx.export for a tower of `dtype` (torch's name) at `opset`."""
    import torch

    aten = torch.ops.aten
    table: dict[Callable[..., Any], Callable[..., Any]] = {aten._cdist_forward.default: _distances}
    if dtype == "bfloat16" and opset < BFLOAT16_OPSET:
        table[aten.conv2d.default] = _patches_times_kernel
        table[aten.avg_pool2d.default] = _pool_in_float32("AveragePool")
        table[aten.max_pool2d.default] = _pool_in_float32("MaxPool")
    return table


def _distances(x1: Any, x2: Any, p: float, compute_mode: int | None = None) -> Any:
    """Euclidean distances of [b, S, D] and [b, R, D] -> [b, S, R], from differences, so that equal tokens are at 0.

    The [b, S, R, D] differences are made and summed a few channels at a time.
    """
    op = _operators()

    if p != 2:
        raise NotImplementedError(f"cdist with p {p}")
    b, s, d = x1.shape
    step = max(1, min(d, CHUNK_ELEMENTS // (b * s * x2.shape[1])))
    total = None
    for start in range(0, d, step):
        first, last, axis = (op.Constant(value_ints=[v]) for v in (start, min(start + step, d), 2))
        a = op.Unsqueeze(op.Slice(x1, first, last, axis), op.Constant(value_ints=[2]))
        c = op.Unsqueeze(op.Slice(x2, first, last, axis), op.Constant(value_ints=[1]))
        difference = op.Sub(a, c)
        part = op.ReduceSum(op.Mul(difference, difference), op.Constant(value_ints=[3]), keepdims=0)
        total = part if total is None else op.Add(total, part)
    return op.Sqrt(total)


def _patches_times_kernel(
    x: Any, weight: Any, bias: Any = None, stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1), groups: int = 1,
) -> Any:
    """A convolution whose kernels lie side by side, as the matrix product that it is. x [N, C, H, W]."""
    op = _operators()

    n, c, h, w = x.shape
    d, _, p, q = weight.shape
    if tuple(stride) != (p, q) or any(padding) or set(dilation) != {1} or groups != 1:
        raise NotImplementedError("a bfloat16 convolution other than of patches side by side, below opset 22")
    rows, columns = h // p, w // q

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    whole = op.Slice(x, ints(0, 0), ints(rows * p, columns * q), ints(2, 3))
    split = op.Transpose(op.Reshape(whole, ints(n, c, rows, p, columns, q)), perm=[0, 2, 4, 1, 3, 5])
    kernel = op.Transpose(op.Reshape(weight, ints(d, c * p * q)), perm=[1, 0])
    product = op.MatMul(op.Reshape(split, ints(n, rows * columns, c * p * q)), kernel)
    if bias is not None:
        product = op.Add(product, bias)
    return op.Reshape(op.Transpose(product, perm=[0, 2, 1]), ints(n, d, rows, columns))


def _pool_in_float32(name: str) -> Callable[..., Any]:
    def pool(x: Any, kernel_size: Sequence[int], stride: Sequence[int] = (), *others: Any) -> Any:
        op = _operators()
        if any(value not in (0, 1, False, True, None) for other in others for value in _flat(other)):
            raise NotImplementedError(f"{name} in bfloat16 with padding or dilation, below opset 22")
        half = x.dtype == BFLOAT16  # the attention received is float32 already, and stays it
        kernel = list(kernel_size) * (2 // len(kernel_size))
        strides = list(stride) * (2 // len(stride)) if stride else kernel
        pooled = getattr(op, name)(op.Cast(x, to=FLOAT) if half else x, kernel_shape=kernel, strides=strides)
        if isinstance(pooled, Sequence):  # MaxPool gives indices too
            pooled = pooled[0]
        return op.Cast(pooled, to=BFLOAT16) if half else pooled

    return pool


def _operators() -> Any:
    from onnxscript import opset18  # those used here are the same in every later opset

    return opset18


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]
