"""Each rule refuses a graph broken on purpose, naming node and rule; all violations come at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import ArrayLike, DTypeLike
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from earlytom.errors import ExportError
from export.onnx.check import GraphError, check_graph
from export.onnx.operators import OPERATORS
from export.onnx.rules import Violation

F, H, B = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
RNG = np.random.default_rng(0)


def node(op: str, inputs: str, output: str, **attributes: object) -> NodeProto:
    """inputs: names separated by spaces, "-" for one left out. The node is called like its output."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return make_node(op, names, output.split(), name=output.split()[0], **attributes)


def constant(name: str, values: ArrayLike, dtype: DTypeLike = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def model(
    nodes: list[NodeProto], constants: tuple[TensorProto, ...] = (), *, kind: int = F, out: int | None = None,
    shape: tuple[int | str, ...] = (2, 3, 4), opset: int = 20, rank: int | None = None,
) -> ModelProto:
    """x [2, 3, 4] -> y, whose shape is left to inference."""
    y = make_tensor_value_info("y", kind if out is None else out, None if rank is None else [None] * rank)
    graph = make_graph(nodes, "g", [make_tensor_value_info("x", kind, shape)], [y], constants)
    built = make_model(graph, opset_imports=[make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(built, data_prop=True)
    built.graph.output[0].CopyFrom(inferred.graph.output[0])
    return built


def violations(broken: ModelProto | Path, dtype: str = "fp32", opset: int = 20) -> tuple[Violation, ...]:
    with pytest.raises(GraphError) as caught:
        check_graph(broken, dtype=dtype, opset=opset)
    for violation in caught.value.violations:
        assert str(violation) in str(caught.value)
    return caught.value.violations


def attention(
    half: int | None = None, *, scale: bool = True, between: str | None = None, cast: bool = True, axis: int = -1,
    wide: bool = False, read: str | None = None,
) -> ModelProto:
    """softmax(x * s . x') . x as the exporter writes it, with what is to be broken; read: a value read once more."""
    kind = half or F
    number = np.float16 if kind == H else np.float32
    nodes = [node("Mul", "x s", "q") if scale else node("Neg", "x", "q"), node("Transpose", "x", "k", perm=[0, 2, 1])]
    last = "product"
    if wide:
        nodes += [node("Cast", "q", "q32", to=F), node("Cast", "k", "k32", to=F), node("MatMul", "q32 k32", last)]
    else:
        nodes.append(node("MatMul", "q k", last))
    if between:
        nodes.append(node(between, last, "between"))
        last = "between"
    if half and cast and not wide:
        nodes.append(node("Cast", last, "product32", to=F))
        last = "product32"
    nodes.append(node("Softmax", last, "softmax", axis=axis))
    last = "softmax"
    if half and cast:
        nodes.append(node("Cast", last, "softmax16", to=kind))
        last = "softmax16"
    nodes.append(node("MatMul", f"{last} x", "y"))
    constants = (constant("s", 0.5, number),) if scale else ()
    if read:  # its mean over queries, as numbers of the graph's type
        nodes[-1].output[0] = "mixed"
        nodes += [node("ReduceMean", f"{read} axes", "mean"), node("Cast", "mean", "mean16", to=kind),
                  node("MatMul", "mean16 mixed", "y")]
        constants += (constant("axes", [1], np.int64),)
    return model(nodes, constants, kind=kind)


def test_good_graphs_pass_and_are_summarised() -> None:
    summary = check_graph(attention(), dtype="fp32", opset=20)
    assert summary.attention == {"softmax": "primitives"}
    assert summary.operators == {"MatMul": 2, "Mul": 1, "Softmax": 1, "Transpose": 1}
    assert (summary.nodes, summary.initializer_bytes, summary.largest_constants) == (5, 4, (("s", 4),))
    summary = check_graph(attention(H), dtype="fp16", opset=20)
    assert summary.attention == {"softmax": "primitives"} and not summary.float32_products
    operator = model([node("Unsqueeze", "x a", "u"), node("Attention", "u u u", "y", scale=0.5)],
                     (constant("a", [1], np.int64),), opset=23)
    assert check_graph(operator, dtype="fp32", opset=23).attention == {"y": "operator"}


WEIGHT = constant("w", RNG.normal(size=(4, 4)))
AXES = constant("axes", [1], np.int64)
GRAPHS: dict[str, tuple[Callable[[], ModelProto], str, str, str]] = {
    # id: graph, dtype, node, rule
    "NonZero": (lambda: model([node("NonZero", "x", "y")], out=TensorProto.INT64), "fp32", "y", "operator"),
    "Unique": (lambda: model([node("Unique", "x", "y")]), "fp32", "y", "operator"),
    "bitwise": (lambda: model([node("BitwiseNot", "x", "y")], kind=TensorProto.INT64), "fp32", "y", "operator"),
    "sequence": (lambda: model([node("SequenceConstruct", "x x", "s"), node("ConcatFromSequence", "s", "y", axis=0)]),
                 "fp32", "s", "operator"),
    "sum of integers": (lambda: model([node("CumSum", "x axis", "y")], (constant("axis", 0, np.int64),),
                                      kind=TensorProto.INT64), "fp32", "y", "type"),
    "int16": (lambda: model([node("Identity", "x", "y")], kind=TensorProto.INT16), "fp32", "y", "type"),
    "padded booleans": (lambda: model([node("Pad", "x p", "y")], (constant("p", [0] * 6, np.int64),),
                                      kind=TensorProto.BOOL), "fp32", "y", "type"),
    "float64": (lambda: model([node("Cast", "x", "d", to=TensorProto.DOUBLE), node("Cast", "d", "y", to=F)]),
                "fp32", "d", "float64"),
    "uint8 used": (lambda: model([node("Transpose", "x", "t"), node("Cast", "t", "y", to=F)], kind=TensorProto.UINT8,
                                 out=F), "fp32", "t", "uint8"),
    "uint8 made": (lambda: model([node("Cast", "x", "u", to=TensorProto.UINT8), node("Cast", "u", "y", to=F)]),
                   "fp32", "u", "uint8"),
    "open input": (lambda: model([node("Neg", "x", "y")], shape=("batch", 3, 4)), "fp32", "x", "static-shape"),
    "open value": (lambda: model([node("Neg", "x", "y")], shape=(2, 3, "n")), "fp32", "y", "static-shape"),
    "large K": (lambda: model([node("TopK", "x k", "y i")], (constant("k", [3840], np.int64),), shape=(2, 4000)),
                "fp32", "y", "topk"),
    "unsorted": (lambda: model([node("TopK", "x k", "y i", sorted=0)], (constant("k", [2], np.int64),)),
                 "fp32", "y", "topk"),
    "computed axes": (lambda: model([node("Identity", "axes", "a"), node("ReduceSum", "x a", "y")], (AXES,), rank=3),
                      "fp32", "y", "reduce-axes"),
    "computed shape": (lambda: model([node("Shape", "x", "s"), node("Reshape", "x s", "y")]),
                       "fp32", "y", "constant-argument"),
    "cubic": (lambda: model([node("Resize", "x - - sizes", "y", mode="cubic")],
                            (constant("sizes", [1, 1, 8, 8], np.int64),), shape=(1, 1, 4, 4)), "fp32", "y", "resize"),
    "dilated": (lambda: model([node("MaxPool", "x", "y", kernel_shape=[2, 2], dilations=[2, 2])], shape=(1, 1, 4, 4)),
                "fp32", "y", "pooling"),
    "mean of the norm": (lambda: model([node("LayerNormalization", "x s", "n mean"), node("Add", "n mean", "y")],
                                       (constant("s", [1.0, 2, 3, 4]),)), "fp32", "n", "single-output"),
    "between": (lambda: attention(between="Neg"), "fp32", "softmax", "attention"),
    "between, fp16": (lambda: attention(H, between="Neg"), "fp16", "softmax", "attention"),
    "q not scaled": (lambda: attention(scale=False), "fp32", "product", "attention"),
    "softmax over heads": (lambda: attention(axis=1), "fp32", "softmax", "attention"),
    "product in float32": (lambda: attention(H, wide=True), "fp16", "product", "attention"),
    "softmax read": (lambda: attention(read="softmax"), "fp32", "softmax", "attention"),
    "softmax read, fp16": (lambda: attention(H, read="softmax"), "fp16", "softmax", "attention"),
    "product read, fp16": (lambda: attention(H, read="product32"), "fp16", "softmax", "attention"),
    "softmax in fp16": (lambda: attention(H, cast=False), "fp16", "softmax", "float32"),
    "softmax in bf16": (lambda: model([node("Softmax", "x", "y")], kind=B), "bf16", "y", "float32"),
    "norm in fp16": (lambda: model([node("LayerNormalization", "x s", "y")],
                                   (constant("s", [1, 2, 3, 4], np.float16),), kind=H), "fp16", "y", "float32"),
    "comparison in fp16": (lambda: model([node("Greater", "x x", "y")], kind=H, out=TensorProto.BOOL),
                           "fp16", "y", "float32"),
    "weights in float32": (lambda: model([node("Cast", "x", "c", to=F), node("MatMul", "c w", "y")], (WEIGHT,), kind=H,
                                         out=F), "fp16", "y", "weight-type"),
    "stored twice": (lambda: model([node("MatMul", "x w", "m"), node("MatMul", "m v", "y")],
                                   (WEIGHT, constant("v", numpy_helper.to_array(WEIGHT)))),
                     "fp32", "v", "duplicate-initializer"),
    "stored in vain": (lambda: model([node("Neg", "x", "y")], (WEIGHT,)), "fp32", "w", "unused-initializer"),
    "computed in vain": (lambda: model([node("Neg", "x", "y"), node("Abs", "x", "z")]), "fp32", "z", "dead-node"),
    "wrong shape": (lambda: model([node("MatMul", "x w", "y")], (constant("w", RNG.normal(size=(5, 4))),), rank=3),
                    "fp32", "graph", "onnx-checker"),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_broken_graph_is_refused_with_node_and_rule(case: str) -> None:
    build, dtype, name, rule = GRAPHS[case]
    found = violations(build(), dtype)
    assert (name, rule) in [(v.node, v.rule) for v in found], found


@pytest.mark.parametrize(
    ("attributes", "inputs"),
    [({"is_causal": 1}, "u u u"), ({"softcap": 2.0}, "u u u"), ({"softmax_precision": 1}, "u u u"),
     ({"scale": None}, "u u u"), ({}, "u u u m")],
)
def test_attention_that_tensorrt_refuses(attributes: dict[str, object], inputs: str) -> None:
    given = {name: value for name, value in {"scale": 0.5, **attributes}.items() if value is not None}
    constants = (constant("a", [1], np.int64), *([constant("m", np.ones((3, 3)))] if "m" in inputs else []))
    broken = model([node("Unsqueeze", "x a", "u"), node("Attention", inputs, "y", **given)], constants, opset=23)
    assert [(v.node, v.rule) for v in violations(broken, opset=23)] == [("y", "attention")]


def test_other_domains_and_opsets() -> None:
    foreign = model([node("Neg", "x", "y")])
    foreign.graph.node[0].domain = "com.microsoft"
    foreign.opset_import.append(make_opsetid("com.microsoft", 1))
    found = violations(foreign, opset=18)
    assert {("graph", "standard-domain"), ("y", "standard-domain"), ("graph", "opset")} <= {
        (v.node, v.rule) for v in found
    }


def test_all_violations_come_at_once_and_a_nameless_node_is_numbered() -> None:
    nodes = [node("NonZero", "x", "n"), node("Cast", "n", "d", to=TensorProto.DOUBLE), node("Cast", "d", "y", to=F)]
    broken = model(nodes, (WEIGHT,))
    broken.graph.node[0].name = ""
    rules = {(v.node, v.rule) for v in violations(broken)}
    assert {("NonZero#0", "operator"), ("d", "float64"), ("w", "unused-initializer")} <= rules


def test_weights_in_a_data_file_are_read_from_there(tmp_path: Path) -> None:
    twice = model([node("MatMul", "x w", "m"), node("MatMul", "m v", "y")],
                  (WEIGHT, constant("v", numpy_helper.to_array(WEIGHT))))
    path = tmp_path / "vision.onnx"
    onnx.save(twice, path, save_as_external_data=True, location="vision.onnx.data", size_threshold=0)
    assert [(v.node, v.rule) for v in violations(path)] == [("v", "duplicate-initializer")]
    (tmp_path / "vision.onnx.data").write_bytes(b"short")
    assert {("w", "weights"), ("v", "weights")} <= {(v.node, v.rule) for v in violations(path)}


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    for content in (b"not ONNX at all", attention().SerializeToString()[:-40]):
        path.write_bytes(content)
        with pytest.raises(ExportError):
            check_graph(path, dtype="fp32", opset=20)
    with pytest.raises(ExportError, match="not a readable ONNX file"):
        check_graph(tmp_path / "missing.onnx", dtype="fp32", opset=20)
    with pytest.raises(ExportError, match="dtype 'int8'"):
        check_graph(path, dtype="int8", opset=20)


def test_the_list_of_operators_has_what_onnx_has() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(OPERATORS) <= known
    assert not {"NonZero", "Unique", "Compress", "BitwiseAnd", "SequenceAt", "Loop", "If"} & set(OPERATORS)
