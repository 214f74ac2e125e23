"""What an exported graph may contain, so that TensorRT's parser takes it, fuses it and computes in the type asked for.

Operators, types and limits are those of onnx-tensorrt's docs/operators.md; the forms of attention and what must stay
float32 follow docs/onnx.md. Every violation is collected with its node and its rule, then all are raised at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .graph import Graph, attribute
from .operators import (
    ANY,
    CONSTANT_INPUTS,
    DATA_INPUT,
    FLOAT32_OPERATORS,
    HALVES,
    OPERATORS,
    RESIZE,
    TOPK_LIMIT,
    WEIGHTED,
)

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Violation:
    """One broken rule: the node (or tensor) that breaks it, its operator ("" for a tensor), the rule, and how."""

    node: str
    operator: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.node}{f' ({self.operator})' if self.operator else ''} breaks {self.rule}: {self.detail}"


def domain_violations(model: onnx.ModelProto, opset: int) -> Iterator[Violation]:
    """Standard operators only, of the opset asked for, in one flat graph."""
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            yield Violation("graph", "", "standard-domain", f"it imports the domain {entry.domain!r}")
        elif entry.version != opset:
            yield Violation("graph", "", "opset", f"it is opset {entry.version}, opset {opset} was asked for")
    for function in model.functions:
        yield Violation(function.name, "", "standard-domain", "functions are not inlined")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield Violation(node.name, node.op_type, "standard-domain", f"its domain is {node.domain!r}")


def _operators(graph: Graph) -> Iterator[Violation]:
    """Operators that TensorRT's parser takes, on types that it takes."""
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx"):
            continue  # named by standard-domain
        types = OPERATORS.get(node.op_type)
        if types is None:
            yield _broken(graph, node, "operator", "TensorRT's parser does not take it, or not with fixed shapes")
        elif node.input:
            name = node.input[DATA_INPUT.get(node.op_type, 0)]
            if graph.type(name) not in types:
                yield _broken(graph, node, "type", f"its input is {graph.type(name)}, TensorRT takes {_join(types)}")


def _types(graph: Graph) -> Iterator[Violation]:
    """uint8 only enters, and is cast at once; float64 nowhere; nothing that TensorRT does not compute with."""
    entering = {value.name for value in graph.inputs}
    for name, kind in graph.types.items():
        node = graph.producer.get(name)
        label, operator = (graph.names[id(node)], node.op_type) if node is not None else (name, "")
        if kind == "DOUBLE":
            yield Violation(label, operator, "float64", f"{name} is float64")
        elif kind == "UINT8" and name in entering:
            for user in graph.users.get(name, []):
                if user.op_type != "Cast":
                    yield _broken(graph, user, "uint8", f"it takes the uint8 input {name}, which must be cast first")
        elif kind == "UINT8":
            yield Violation(label, operator, "uint8", f"{name} is uint8, which only a graph input may be")
        elif kind not in ANY:
            yield Violation(label, operator, "type", f"{name} is {kind}")


def _shapes(graph: Graph) -> Iterator[Violation]:
    """Every value has a known shape without symbols."""
    for value in graph.inputs:
        if graph.shapes[value.name] is None:
            yield Violation(value.name, "", "static-shape", "the input's shape is not fixed")
    for node in graph.nodes:
        unknown = [name for name in node.output if name and graph.shapes.get(name) is None]
        if unknown:
            yield _broken(graph, node, "static-shape", f"the shape of {', '.join(unknown)} is not fixed")


def _arguments(graph: Graph) -> Iterator[Violation]:
    """Limits on arguments: constant axes, TopK, Resize, poolings, LayerNormalization."""
    for node in graph.nodes:
        op = node.op_type
        positions = (1,) if op.startswith("Reduce") else CONSTANT_INPUTS.get(op, ())
        for position in positions:
            if position < len(node.input) and node.input[position] and not graph.is_constant(node.input[position]):
                rule = "reduce-axes" if op.startswith("Reduce") else "constant-argument"
                yield _broken(graph, node, rule, f"its input {position} ({node.input[position]}) must be a constant")
        if op == "TopK":
            shape = graph.shapes.get(node.output[0])
            axis = attribute(node, "axis", -1)
            if shape is not None and shape[axis] >= TOPK_LIMIT:
                yield _broken(graph, node, "topk", f"K is {shape[axis]}, TensorRT takes less than {TOPK_LIMIT}")
            if not attribute(node, "sorted", 1):
                yield _broken(graph, node, "topk", "it must be sorted")
        if op == "Resize":
            wrong = [
                f"{name} {attribute(node, name, default)}" for name, default, allowed in RESIZE
                if attribute(node, name, default) not in allowed
            ]
            if wrong:
                yield _broken(graph, node, "resize", f"TensorRT does not take {', '.join(wrong)}")
        if op in ("AveragePool", "MaxPool") and any(d != 1 for d in attribute(node, "dilations", [])):
            yield _broken(graph, node, "pooling", "TensorRT pools without dilation")
        if op in ("MaxPool", "LayerNormalization") and any(node.output[1:]):
            yield _broken(graph, node, "single-output", "TensorRT gives its first output only")


def _attention(graph: Graph) -> Iterator[Violation]:
    """Attention as compilers recognise it: q scaled, q.kT, softmax behind at most a cast to float32, product with v.

    Nothing else reads product or softmax: a matrix that is needed elsewhere has to be written out, and is not fused.
    """
    for node in graph.nodes:
        if node.op_type == "Attention":
            yield from _attention_operator(graph, node)
        mixed = graph.softmax_product(node) if node.op_type == "Softmax" else None
        if mixed is None:
            continue
        product = graph.before(node.input[0], skip_cast=True)
        if product is None or product.op_type != "MatMul":
            between = "a graph input" if product is None else f"{graph.names[id(product)]} ({product.op_type})"
            yield _broken(graph, node, "attention", f"{between} stands between the product q.kT and the softmax")
            continue
        scale = graph.before(product.input[0])
        if scale is None or scale.op_type != "Mul" or not any(graph.shapes.get(n) == () for n in scale.input):
            yield _broken(graph, product, "attention", "q is not multiplied by the scale before the product q.kT")
        if attribute(node, "axis", -1) not in (-1, len(graph.shapes.get(node.input[0]) or ()) - 1):
            yield _broken(graph, node, "attention", "the softmax is not over the last axis")
        matrix = {product.output[0], node.input[0], node.output[0], mixed.input[0]}
        if any(len(graph.users[name]) > 1 for name in matrix):
            yield _broken(graph, node, "attention", "its matrix is read by another node too")
        for part in (product, mixed):
            if graph.type(part.output[0]) != graph.dtype:
                found = graph.type(part.output[0])
                yield _broken(graph, part, "attention", f"the product is {found}, the graph's type is {graph.dtype}")


def _attention_operator(graph: Graph, node: onnx.NodeProto) -> Iterator[Violation]:
    if len([name for name in node.input if name]) != 3 or any(node.output[1:]):
        yield _broken(graph, node, "attention", "it takes q, k and v and gives one output, without mask and cache")
    for name, default in (("is_causal", 0), ("softcap", 0.0), ("softmax_precision", None)):
        if attribute(node, name, default) != default:
            yield _broken(graph, node, "attention", f"TensorRT's parser refuses its {name} {attribute(node, name)}")
    if attribute(node, "scale") is None:
        yield _broken(graph, node, "attention", "its scale is not written down")
    if graph.type(node.input[0]) != graph.dtype:
        yield _broken(graph, node, "attention", f"it is {graph.type(node.input[0])}, the graph's type is {graph.dtype}")


def _precision(graph: Graph) -> Iterator[Violation]:
    """Weights multiply in the graph's type; sums over many values and choices are float32."""
    for node in graph.nodes:
        if node.op_type in FLOAT32_OPERATORS and graph.type(node.input[0]) in HALVES:
            yield _broken(graph, node, "float32", f"it computes in {graph.type(node.input[0])}, it must be float32")
        # A weight is a matrix: the plan also multiplies by constant rows of zeros and ones, in float32.
        weighted = node.op_type in WEIGHTED and any(
            name in graph.initializers and sum(size > 1 for size in graph.shapes[name] or ()) > 1
            for name in node.input[:2]
        )
        if weighted and graph.type(node.output[0]) != graph.dtype:
            found = graph.type(node.output[0])
            yield _broken(graph, node, "weight-type", f"it multiplies weights in {found}, not in {graph.dtype}")


def _initializers(graph: Graph) -> Iterator[Violation]:
    """Nothing is stored twice, nothing is stored or computed in vain."""
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in graph.initializers.items():
        if name not in graph.users and name not in graph.outputs:
            yield Violation(name, "", "unused-initializer", "no node reads it")
        try:
            key = (tensor.data_type, tuple(tensor.dims), graph.digest(tensor))
        except (OSError, ValueError, KeyError) as error:
            yield Violation(name, "", "weights", f"its data cannot be read: {error}")
            continue
        if seen.setdefault(key, name) != name:
            yield Violation(name, "", "duplicate-initializer", f"it is equal to {seen[key]}")
    for node in graph.nodes:
        if not any(name in graph.users or name in graph.outputs for name in node.output):
            yield _broken(graph, node, "dead-node", "nothing reads its output")


def _broken(graph: Graph, node: onnx.NodeProto, rule: str, detail: str) -> Violation:
    return Violation(graph.names[id(node)], node.op_type, rule, detail)


def _join(types: frozenset[str]) -> str:
    return ", ".join(sorted(types))


RULES: tuple[Callable[[Graph], Iterator[Violation]], ...] = (
    _operators, _types, _shapes, _arguments, _attention, _precision, _initializers,
)
