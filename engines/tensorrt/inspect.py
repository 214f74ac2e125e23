"""What was built: the engine inspector's account of kernels and types, held against what the graph asked for.

Fusing fails silently in TensorRT, and so does falling back to float32. `summarise` is a pure function of the
inspector's JSON; `inspect_engine` asks an engine on a card for it. Without a card, `inspect_plan` reads in the file
itself what an engine of TensorRT for RTX is going to compile.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlytom.dtypes import DTYPES
from earlytom.errors import EngineError

from ..bundle.manifest import Inspection, Manifest
from ..products import import_product
from .network import make_logger, refit

_FUSED = re.compile(r"mha|fmha|flash_?att|sdpa", re.IGNORECASE)  # in names of kernels
# Nodes of the graph in "Metadata", and in names of engine layers, which are made of theirs with other separators.
_NODE = re.compile(r"vision[._][\w.]+/\w+")
_ATTENTION = re.compile(r"vision[._]layers[._](\d+)[._]attention/(MatMul|Softmax|Attention)")
_PRODUCT = re.compile(r"/(MatMul|Gemm|Conv|Attention)(_\d+)?(_myl\d+_\d+)?$")
# Ours -> what it may be called there, bfloat16 before float16 before float.
_TYPES = (*((d.torch, f"{d.torch}|{d.name}|{d.tensorrt.lower()}") for d in reversed(DTYPES.values())), ("int8", "int8"))


@dataclass(frozen=True)
class EngineSummary:
    """An engine in the inspector's words.

    kernels: number of layers of the engine; attention: layers of the graph that were to be fused; fused: those of them
    that are; unfused: the others; fused_kernels: the names of the kernels that do it; other_types: (engine layer, type)
    of products of matrices that do not compute in the graph's type; warnings: sentences, empty when all is well.
    """

    kernels: int
    attention: tuple[str, ...]
    fused: tuple[str, ...]
    unfused: tuple[str, ...]
    fused_kernels: tuple[str, ...]
    other_types: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    def inspection(self) -> Inspection:
        """For the manifest."""
        return Inspection(
            self.kernels, len(self.attention), len(self.fused), self.unfused, tuple(sorted(set(self.fused_kernels))),
            self.other_types, self.warnings,
        )


def expected_attention(manifest: Manifest) -> tuple[str, ...]:
    """The attentions that one kernel each should do: those of all layers."""
    return tuple(f"vision.layers.{i}.attention" for i in range(manifest.geometry.layers))


def summarise(text: str, attention: tuple[str, ...], dtype: str) -> EngineSummary:
    """The summary of an engine from the inspector's JSON. attention: see expected_attention; dtype: "float16".

    Raises EngineError when the text is not the inspector's.
    """
    try:
        layers = json.loads(text)["Layers"]
        assert isinstance(layers, list)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise EngineError(f"the inspector's answer cannot be read ({type(error).__name__}: {error})") from None
    detailed = [layer for layer in layers if isinstance(layer, dict) and ("Inputs" in layer or "TacticName" in layer)]
    if not detailed:
        told = "the engine was built without detailed profiling, so its kernels are not known: build with detailed=True"
        return EngineSummary(len(layers), attention, (), (), (), (), (told,))

    kernels = tuple(_kernel_name(layer) for layer in detailed if _FUSED.search(_kernel_name(layer)))
    done = _fused_layers(detailed)
    traced = any(_ATTENTION.search(_nodes_text(layer)) for layer in detailed)
    warnings = []
    if traced:
        fused = tuple(name for name in attention if name in done)
        unfused = tuple(name for name in attention if name not in done)
    else:  # nodes of the graph are not named: kernels can be counted, not assigned
        fused, unfused = attention[: len(kernels)], ()
        warnings += _too_few(len(kernels), attention, dtype)
    if unfused:
        warnings.append(f"attention is not fused in {len(unfused)} of {len(attention)} layers: {', '.join(unfused)}")
    others = tuple(_other_types(detailed, dtype))
    if others:
        listed = ", ".join(f"{name} ({kind})" for name, kind in others)
        warnings.append(f"{len(others)} products do not compute in {dtype}: {listed}")
    return EngineSummary(len(layers), attention, fused, unfused, kernels, others, tuple(warnings))


def _too_few(kernels: int, attention: tuple[str, ...], dtype: str) -> list[str]:
    if kernels >= len(attention):
        return []
    why = ": TensorRT fuses it in fp16 and bf16 only" if dtype == "float32" else ""
    return [
        f"{kernels} kernels do attention where the graph has {len(attention)} to fuse, and the engine does not say "
        f"which are missing{why}"
    ]


def _kernel_name(layer: dict[str, Any]) -> str:
    """The tactic where there is one, else the engine layer's own name, without the nodes that it may be named after."""
    tactic = str(layer.get("TacticName") or "")
    name = str(layer.get("Name") or "")
    return tactic if _FUSED.search(tactic) or _NODE.search(name) else name


def _nodes_text(layer: dict[str, Any]) -> str:
    return f"{layer.get('Metadata') or ''} {layer.get('Name') or ''}"


def _fused_layers(layers: list[dict[str, Any]]) -> set[str]:
    """Attentions that a kernel named for it does, or one kernel with the softmax and all products in it."""
    parts: dict[str, list[tuple[set[str], bool]]] = {}
    for layer in layers:
        found: dict[str, set[str]] = {}
        for index, part in _ATTENTION.findall(_nodes_text(layer)):
            found.setdefault(f"vision.layers.{index}.attention", set()).add(part)
        for name, kinds in found.items():
            parts.setdefault(name, []).append((kinds, bool(_FUSED.search(_kernel_name(layer)))))
    return {
        name
        for name, kernels in parts.items()
        if any(named for _, named in kernels)
        or (len(kernels) == 1 and ("Attention" in kernels[0][0] or kernels[0][0] >= {"MatMul", "Softmax"}))
    }


def _other_types(layers: list[dict[str, Any]], dtype: str) -> Iterator[tuple[str, str]]:
    """Products of the vision model whose operands are of another floating type, or rounded to TF32."""
    for layer in layers:
        products = [node for node in _NODE.findall(_nodes_text(layer)) if _PRODUCT.search(node)]
        if not products:
            continue
        # Operands only: results may be stored wider for what follows, and scalars (alpha, beta) are not operands.
        operands = [_type(tensor) for tensor in layer.get("Inputs", []) if _count(tensor) > 1]
        kinds = {kind for kind in operands if kind is not None}
        if "tf32" in str(layer.get("TacticName", "")).lower():
            yield products[0], "tf32"
        elif kinds and dtype not in kinds:
            yield products[0], " and ".join(sorted(kinds))


def _type(tensor: dict[str, Any]) -> str | None:
    text = str(tensor.get("Format/Datatype") or tensor.get("Datatype") or "").lower()
    return next((name for name, pattern in _TYPES if re.search(pattern, text)), None)


def _count(tensor: dict[str, Any]) -> int:
    count = 1
    for extent in tensor.get("Dimensions", []):
        count *= int(extent)
    return count


def inspect_plan(path: Path, manifest: Manifest) -> EngineSummary:
    """What an engine of TensorRT for RTX is going to compile on the card, read from its file; no card is needed.

    The file lists the functions that its kernels are made from, in plain text. That is TensorRT's own affair and not
    documented (seen in 1.7.1), so the attention kernels are counted and nothing more is concluded; `kernels` is 0 and
    a warning says so where the list is not found.
    """
    attention, dtype = expected_attention(manifest), DTYPES[manifest.dtype].torch
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        names = [match[1].decode() for match in re.finditer(rb"function=\{ name=(\w+) fqn=", plan)]
    if not names:
        return EngineSummary(0, attention, (), (), (), (), (f"{path.name} does not list its kernels",))
    kernels = tuple(name for name in names if _FUSED.search(name))
    warnings = tuple(_too_few(len(kernels), attention, dtype))
    return EngineSummary(len(names), attention, attention[: len(kernels)], (), kernels, (), warnings)


def inspect_engine(trt: Any, engine: Any, manifest: Manifest) -> EngineSummary:
    """The summary of a deserialised engine. trt: the product's module. Needs the card that the engine is on.

    An answer that cannot be read is a warning in it: nothing that took minutes to build is lost over it.
    """
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    attention = expected_attention(manifest)
    try:
        return summarise(text, attention, DTYPES[manifest.dtype].torch)
    except EngineError as error:
        return EngineSummary(0, attention, (), (), (), (), (str(error),))


def inspect_file(path: Path, product: str, manifest: Manifest, onnx_path: Path | None = None) -> EngineSummary:
    """The summary of an engine that was just built on this machine's card; one of unknown origin must not be given.

    onnx_path: the graph, for an engine built with strip_weights and for no other. Raises EngineError when it cannot be
    loaded.
    """
    trt = import_product(product)
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # a version-compatible engine brings its runtime; we built it
    engine = runtime.deserialize_cuda_engine(Path(path).read_bytes())
    if engine is None:
        raise EngineError(f"the engine {path} cannot be loaded: {logger.last_words()}")
    if onnx_path is not None:
        refit(trt, engine, onnx_path, logger)
    return inspect_engine(trt, engine, manifest)
