"""Checking an exported graph against all rules at once, and what a good one is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earlytom.dtypes import DTYPES
from earlytom.errors import ExportError

from .graph import Graph
from .operators import WEIGHTED
from .rules import RULES, Violation, domain_violations

if TYPE_CHECKING:
    import onnx


class GraphError(ExportError):
    """A graph that breaks rules; `violations` holds all of them."""

    def __init__(self, name: str, violations: tuple[Violation, ...]) -> None:
        self.violations = violations
        super().__init__(f"{name} cannot be used: " + "; ".join(map(str, violations)))


@dataclass(frozen=True)
class GraphSummary:
    """A graph that keeps the rules, in numbers.

    operators: how many nodes of each; attention: node -> "operator" (Attention) or "primitives" (product, softmax,
    product); float32_products: matrix products that compute in float32 in a half-precision graph; largest_constants:
    (name, bytes) of what is not a weight, largest first.
    """

    nodes: int
    operators: Mapping[str, int]
    attention: Mapping[str, str]
    float32_products: tuple[str, ...]
    initializer_bytes: int
    largest_constants: tuple[tuple[str, int], ...]


def check_graph(source: Path | onnx.ModelProto, *, dtype: str, opset: int) -> GraphSummary:
    """The summary of a graph that keeps every rule. dtype: of its weights, fp32, fp16 or bf16.

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
    violations = list(domain_violations(model, opset))
    try:
        onnx.checker.check_model(model if model is source else str(source), full_check=True)
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        violations.append(Violation("graph", "", "onnx-checker", " ".join(str(error).split())))
    graph = Graph(model, DTYPES[dtype].onnx, None if model is source or not isinstance(source, Path) else source.parent)
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
    )
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
            yield graph.names[id(node)], "primitives"
