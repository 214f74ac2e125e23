"""Small towers exported once for all TensorRT tests, and graphs broken on purpose."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto, helper

from earlytom.dtypes import torch_dtype
from earlytom.tower import StaticTower
from earlytom.vision.geometry import VisionGeometry
from engines.bundle.manifest import Manifest
from export.onnx.exporter import attention_form, export_tower
from tests.cases import small_config, small_vision
from tests.shared import shared

GEOMETRY = VisionGeometry(
    image_size=56, patch_size=14, hidden_size=32, heads=2, intermediate_size=48, layers=2, projector_size=24
)
CONFIG = small_config(frames=6, merge_layers=(1,), frame_budgets=(4,), retain=0.5)


class Exported(NamedTuple):
    path: Path
    manifest: Manifest


def manifest_for(dtype: str, opset: int, **changes: Any) -> Manifest:
    return Manifest.derive(
        changes.pop("config", CONFIG), changes.pop("geometry", GEOMETRY), dtype=dtype, opset=opset, tools={},
        attention=attention_form(opset),
        checkpoint={"name": "random", "format": "none", "digest": "0"}, **changes,
    )


@cache
def exported(dtype: str, opset: int) -> Exported:
    """A tower of two layers as vision.onnx in a directory of its own; do not write into it."""
    def make(folder: Path) -> None:
        folder.mkdir()
        vision = small_vision(GEOMETRY).to(torch_dtype(dtype))
        export_tower(StaticTower(vision, CONFIG), folder / "vision.onnx", opset=opset)

    return Exported(shared(f"tensorrt-{dtype}-{opset}", make) / "vision.onnx", manifest_for(dtype, opset))


def copy_graph(source: Path, folder: Path) -> Path:
    for name in (source.name, f"{source.name}.data"):
        shutil.copyfile(source.with_name(name), folder / name)
    return folder / source.name


def in_float32(path: Path, *nodes: str) -> None:
    """Have the matrix products with these names compute in float32: casts before and after, as a sloppy export has."""
    model = onnx.load(path, load_external_data=False)
    kept = []
    for node in model.graph.node:
        if node.name in nodes:
            half = node.output[0]
            for index, name in enumerate(node.input):
                kept.append(helper.make_node("Cast", [name], [f"{half}.{index}"], to=TensorProto.FLOAT))
                node.input[index] = f"{half}.{index}"
            node.output[0] = f"{half}.wide"
            kept += [node, helper.make_node("Cast", [node.output[0]], [half], to=TensorProto.FLOAT16)]
        else:
            kept.append(node)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(kept)
    onnx.save(model, path)


def write_graph(path: Path, *nodes: onnx.NodeProto, output: str = "y", kind: int = TensorProto.FLOAT) -> Path:
    """A graph with the input x [2, 3] and one output."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    graph = helper.make_graph(list(nodes), "broken", [value], [helper.make_tensor_value_info(output, kind, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.save(model, path)
    return path
