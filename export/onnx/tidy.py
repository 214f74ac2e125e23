"""From the exporter's graph to the graph that is written: each weight once, telling names, nothing of this machine."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .traced import TRACED_KEY

if TYPE_CHECKING:
    import onnx_ir as ir

FOLD_ELEMENTS = 1 << 20  # index tables and masks are made at export time up to this size


def tidy(model: ir.Model, traced: Sequence[str], outputs: Sequence[str]) -> None:
    """Tidy, in place, a graph whose outputs are the values to call `traced` and then those to call `outputs`.

    The traced values keep their names but are no outputs any more.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import optimize_ir

    graph = model.graph
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("tower.")
    _relayout_weights(graph)
    optimize_ir(model, num_iterations=4, input_size_limit=FOLD_ELEMENTS, output_size_limit=FOLD_ELEMENTS)
    _share_equal_initializers(graph)
    common.CommonSubexpressionEliminationPass()(model)  # again: equal constants make equal nodes
    _name_nodes(graph)
    # Only now: the optimiser has put an Identity where one value was several outputs, at the later ones. The
    # intermediates come first, so theirs are the names that survive the removal below.
    for name, value in zip((*traced, *outputs), graph.outputs, strict=True):
        value.name = name
    for _ in traced:
        graph.outputs.pop(0)  # a deleted slice would leave its values marked as outputs
    common.RemoveUnusedNodesPass()(model)
    common.ShapeInferencePass(strict_mode=True, data_prop=True)(model)
    _strip(model)
    graph.name = "earlytom_vision"
    model.metadata_props[TRACED_KEY] = ",".join(traced)


def _relayout_weights(graph: ir.Graph) -> None:
    """Transpose, Reshape or Cast of a weight -> the weight itself, stored that way under its own name.

    Constant folding would do it with a copy in memory and a made-up name; a torch view costs nothing until written.
    """
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

    for node in list(graph):
        weight = node.inputs[0] if node.inputs else None
        if weight is None or weight.name not in graph.initializers or len(weight.uses()) != 1:
            continue
        tensor = weight.const_value
        if not isinstance(tensor, ir.Tensor) or not hasattr(tensor.raw, "permute"):  # not a torch tensor
            continue
        raw = tensor.raw.detach()
        if node.op_type == "Transpose":
            raw = raw.permute(*node.attributes.get_ints("perm", list(range(raw.dim()))[::-1]))
        elif node.op_type == "Reshape" and (shape := node.inputs[1]) is not None:
            sizes = ir.convenience.get_const_tensor(shape)
            if sizes is None:
                continue
            raw = raw.reshape(sizes.numpy().tolist())
        elif node.op_type == "Cast":
            raw = raw.to(to_torch_dtype(ir.DataType(node.attributes.get_int("to"))))
        else:
            continue
        weight.const_value = TorchTensor(raw, name=weight.name)
        weight.shape, weight.dtype = ir.Shape(raw.shape), weight.const_value.dtype
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.remove(node, safe=True)


def _share_equal_initializers(graph: ir.Graph) -> None:
    """One initializer for equal contents, whatever the size; hashes are kept, contents are not."""
    seen: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest())
        first = seen.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            graph.initializers.pop(str(value.name))


def _name_nodes(graph: ir.Graph) -> None:
    """Names that say where a node comes from: "vision.layers.3.attention.q_proj/MatMul", numbered where needed.

    The values between the nodes are named after them, so that no name depends on how the exporter counts.
    """
    taken: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope), "tower")
        base = f"{module.removeprefix('tower.')}/{node.op_type}"
        taken[base] += 1
        node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"
        for index, value in enumerate(node.outputs):
            value.name = node.name + (":out" if index == 0 else f":out{index}")
    constants = [value for value in graph.initializers.values() if not str(value.name).startswith("vision.")]
    for index, value in enumerate(constants):
        value.name = f"constant_{index}"


def _strip(model: ir.Model) -> None:
    """Remove what the exporter notes of the machine it ran on: paths, stack traces, fx nodes."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for item in (model, graph, *graph, *values):
        item.metadata_props.clear()
        item.doc_string = None
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.const_value.name = value.name
            value.const_value.doc_string = None
