"""The static tower as an ONNX graph that TensorRT's parser takes and fuses. See docs/onnx.md."""

from .check import GraphError, GraphSummary, check_graph
from .exporter import ATTENTION_OPSET, DEFAULT_OPSET, OPSETS, OnnxExport, example_inputs, export_tower
from .traced import flatten_trace, run_traced, traced_names, with_traced_outputs

__all__ = [
    "ATTENTION_OPSET",
    "DEFAULT_OPSET",
    "OPSETS",
    "GraphError",
    "GraphSummary",
    "OnnxExport",
    "check_graph",
    "example_inputs",
    "export_tower",
    "flatten_trace",
    "run_traced",
    "traced_names",
    "with_traced_outputs",
]
