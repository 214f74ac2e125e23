"""The static tower as one ONNX file with its weights beside it, in the form that TensorRT's parser takes and fuses.

torch.onnx traces; what is done here is the rest: weights stored once and in the layout they are used in, names that say
which layer a node came from, every shape written down, nothing of the exporting machine in the file, the same bytes
every time. `rules.py` checks the result. Why the graph looks as it does: docs/onnx.md.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earlytom.errors import ExportError

from .tidy import tidy
from .traced import flatten_trace, traced_names
from .translate import translations

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import Tensor, nn

    from earlytom.tower import StaticTower

OPSETS = (18, 19, 20, 23)
DEFAULT_OPSET = 20  # the first with Gelu; 23 is the first with Attention
ATTENTION_OPSET = 23
EXPORTER_LOG = "torch.onnx._internal.exporter._registration"
OUTPUTS = ("tokens", "positions", "dynamic", "weights")
INLINE_BYTES = 1024  # constants up to this size stay in the .onnx file, where tools can show them


@dataclass(frozen=True)
class OnnxExport:
    """What was written: the graph, its one data file, and the names in it.

    attention: the form it has in the graph, "fused" (one operator) or "primitives"; inputs, outputs: of the graph, in
    order; traced: intermediates with stable names (`similarity_8`, `weights_8`,
    `hidden_8`, ..., `similarity_final`, `received`), empty for an unpruned tower; nodes: operators in the graph.
    """

    path: Path
    data: Path
    opset: int
    attention: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    traced: tuple[str, ...]
    nodes: int


def export_tower(
    tower: StaticTower, path: Path, *, opset: int = DEFAULT_OPSET, progress: Callable[[str], None] | None = None
) -> OnnxExport:
    """Write `tower` to `path` and its weights to `path` + ".data"; nothing is left behind when that fails.

    From opset 23 on attention is the Attention operator, below it is written out (q scaled first); the tower's own
    choice is not used. The dtype is that of the tower's weights. progress: called with the name of each step. Weights
    are not copied: memory beyond the tower's is one tensor at a time.

    Raises ExportError when the opset is not supported, the graph cannot be made, or the files cannot be written.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} cannot be exported, choose one of {', '.join(map(str, OPSETS))}")
    report = progress or (lambda step: None)
    path = Path(path)
    data = path.with_name(path.name + ".data")
    try:
        report("trace")
        model, traced = _trace(tower, opset)
        report("optimise")
        with _quiet("onnx_ir", "onnxscript"):
            tidy(model, traced, OUTPUTS)
    except Exception as error:
        raise ExportError(f"the tower could not be traced to ONNX opset {opset}: {_first_line(error)}") from error
    report("write")
    _write(model, path, data)
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    return OnnxExport(path, data, opset, attention_form(opset), inputs, OUTPUTS, traced, len(model.graph))


def attention_form(opset: int) -> str:
    """The form of attention that a graph of this opset has, one of ATTENTION_FORMS."""
    return "fused" if opset >= ATTENTION_OPSET else "primitives"


def example_inputs(tower: StaticTower) -> dict[str, Tensor]:
    """Name -> zeros of every input: feeds the tracing and names the graph's inputs."""
    import torch

    return {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device=tower.vision.device)
        for name, (dtype, shape) in tower.shapes.inputs.items()
    }


def _trace(tower: StaticTower, opset: int) -> tuple[ir.Model, tuple[str, ...]]:
    """The tower as the exporter gives it, unoptimised: intermediates first, then the four outputs."""
    import torch

    from earlytom.tower import StaticTower

    # The same vision weights in the form of attention that the opset has.
    tower = StaticTower(tower.vision, tower.config, batch=tower.shapes.batch, attention=attention_form(opset))
    inputs = example_inputs(tower)
    module = _traced_module(tower).eval()
    # The exporter logs that torchvision is not installed, which is not needed.
    with warnings.catch_warnings(), torch.no_grad(), _quiet("torch.onnx", EXPORTER_LOG):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, tuple(inputs.values()), dynamo=True, opset_version=opset, optimize=False, verbose=False,
            input_names=list(inputs), custom_translation_table=translations(_name(tower.vision.dtype), opset),
        )
    assert program is not None
    return program.model, traced_names(tower)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Nothing below an error from these loggers."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    try:
        for logger in found:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(found, levels):
            logger.setLevel(level)


def _traced_module(tower: StaticTower) -> nn.Module:
    """A module whose outputs are the tower's intermediates and then its outputs."""
    from torch import nn

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
            trace = self.tower.trace(frames)
            return (*flatten_trace(trace), *trace.outputs)

    return Traced()


def _write(model: ir.Model, path: Path, data: Path) -> None:
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            needed = f"{size / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free"
            raise OSError(errno.ENOSPC, f"the disk is full, {needed}")
        ir.save(model, path, external_data=data.name, size_threshold_bytes=INLINE_BYTES)
        data.touch()  # a graph of small constants has a data file too
    except BaseException as error:
        path.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ExportError(f"{path} could not be written: {error.strerror or _first_line(error)}") from error
        raise


def _first_line(error: BaseException) -> str:
    """What an exception says, without the exporter's advice and escape codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error.__cause__ or error)).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
