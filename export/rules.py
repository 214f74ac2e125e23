"""What an exported graph may contain, so that TensorRT's parser takes it, fuses it and computes in the type asked for.

Operators, types and limits are those of onnx-tensorrt's docs/operators.md; the forms of attention and what must stay
float32 follow docs/onnx.md. Every violation is collected with its node and its rule, then all are raised at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earlytom.errors import ExportError

from .graph import ANY, DATA_INPUT, DTYPES, HALVES, OPERATORS, Graph, attribute

if TYPE_CHECKING:
    import onnx

# Inputs that TensorRT or a static shape needs as constants; Reduce* are added in `_arguments`.
CONSTANT_INPUTS = {"Squeeze": (1,), "Unsqueeze": (1,), "Slice": (1, 2, 3, 4), "Pad": (1, 3), "CumSum": (1,),
                   "TopK": (1,), "Reshape": (1,), "Expand": (1,), "Tile": (1,), "Resize": (1, 2, 3), "OneHot": (1,),
                   "Split": (1,), "Trilu": (1,), "ConstantOfShape": (0,)}  # fmt: skip
TOPK_LIMIT = 3840
# Sums over many values, and everything that decides a choice: float32 however the weights are stored.
FLOAT32_OPERATORS = frozenset({
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization", "Softmax", "LogSoftmax",
    "Exp", "CumSum", "TopK", "ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
})  # fmt: skip
WEIGHTED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


@dataclass(frozen=True)
class Violation:
    """One broken rule: the node (or tensor) that breaks it, its operator ("" for a tensor), the rule, and how."""

    node: str
    operator: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.node}{f' ({self.operator})' if self.operator else ''} breaks {self.rule}: {self.detail}"


class GraphError(ExportError):
    """A graph that breaks rules; `violations` holds all of them."""

    def __init__(self, name: str, violations: tuple[Violation, ...]) -> None:
        self.violations = violations
        super().__init__(f"{name} cannot be used: " + "; ".join(map(str, violations)))


@dataclass(frozen=True)
class GraphSummary:
    """A graph that keeps the rules, in numbers.

    operators: how many nodes of each; attention: node -> "operator" (Attention), "primitives" (product, softmax,
    product) or "matrix" (the same, its matrix read elsewhere too); float32_products: matrix products that compute in
    float32 in a half-precision graph; largest_constants: (name, bytes) of what is not a weight, largest first.
    """

    nodes: int
    operators: Mapping[str, int]
    attention: Mapping[str, str]
    float32_products: tuple[str, ...]
    initializer_bytes: int
    largest_constants: tuple[tuple[str, int], ...]


def check_graph(source: Path | onnx.ModelProto, *, dtype: str, opset: int) -> GraphSummary:
    """The summary of a graph that keeps every rule. dtype: of its weights, fp32, fp16 or bf16 (or torch's names).

    A ModelProto must hold its weights; at a path they may lie in data files. Raises GraphError, an ExportError with all
    violations, and ExportError when the file cannot be read.
    """
    import onnx

    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    name = "the graph"
    model = source
    if not isinstance(model, onnx.ModelProto):
        name = str(source)
        try:
            model = onnx.load(source, load_external_data=False)
        except Exception as error:  # protobuf's own exception types differ between its implementations
            raise ExportError(f"{source} is not a readable ONNX file: {error}") from error
    violations = list(_domains(model, opset))
    try:
        onnx.checker.check_model(model if model is source else str(source), full_check=True)
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        violations.append(Violation("graph", "", "onnx-checker", " ".join(str(error).split())))
    graph = Graph(model, DTYPES[dtype], None if model is source or not isinstance(source, Path) else source.parent)
    for rule in RULES:
        violations += rule(graph)
    if violations:
        raise GraphError(name, tuple(violations))
    return summarise(graph)


def summarise(graph: Graph) -> GraphSummary:
    constants = [(n, graph.size(t)) for n, t in graph.initializers.items() if not n.startswith("vision.")]
    products = (
        [] if graph.dtype == "FLOAT"
        else [n for n in graph.nodes if n.op_type in WEIGHTED and graph.type(n.output[0]) == "FLOAT"]
    )  # fmt: skip
    return GraphSummary(
        nodes=len(graph.nodes),
        operators=dict(sorted(Counter(node.op_type for node in graph.nodes).items())),
        attention=dict(_attention_forms(graph)),
        float32_products=tuple(graph.names[id(node)] for node in products),
        initializer_bytes=sum(map(graph.size, graph.initializers.values())),
        largest_constants=tuple(sorted(constants, key=lambda item: (-item[1], item[0]))[:5]),
    )


def _attention_forms(graph: Graph) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op_type == "Attention":
            yield graph.names[id(node)], "operator"
        elif node.op_type == "Softmax" and graph.softmax_product(node) is not None:
            plain = len(graph.users[node.output[0]]) == 1
            yield graph.names[id(node)], "primitives" if plain else "matrix"


def _domains(model: onnx.ModelProto, opset: int) -> Iterator[Violation]:
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
            ]  # fmt: skip
            if wrong:
                yield _broken(graph, node, "resize", f"TensorRT does not take {', '.join(wrong)}")
        if op in ("AveragePool", "MaxPool") and any(d != 1 for d in attribute(node, "dilations", [])):
            yield _broken(graph, node, "pooling", "TensorRT pools without dilation")
        if op in ("MaxPool", "LayerNormalization") and any(node.output[1:]):
            yield _broken(graph, node, "single-output", "TensorRT gives its first output only")


RESIZE = (
    ("mode", "nearest", ("nearest", "linear")),
    ("coordinate_transformation_mode", "half_pixel",
     ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")),
    ("nearest_mode", "round_prefer_floor", ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    ("keep_aspect_ratio_policy", "stretch", ("stretch",)),
    ("antialias", 0, (0,)),
)  # fmt: skip


def _attention(graph: Graph) -> Iterator[Violation]:
    """Attention as compilers recognise it: q scaled, q.kT, softmax behind at most a cast to float32, product with v."""
    for node in graph.nodes:
        if node.op_type == "Attention":
            yield from _attention_operator(graph, node)
        if node.op_type != "Softmax" or graph.softmax_product(node) is None:
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
        for part in (product, graph.softmax_product(node)):
            if part is not None and graph.type(part.output[0]) != graph.dtype:
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
)  # fmt: skip
