"""From a graph to TensorRT's network: all that the parser objects to, and whether the network is what was announced.

Works with either product, whose module is passed in as `trt`. Errors that a logger collected are passed on in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlytom.dtypes import DTYPES
from earlytom.errors import EngineError

# What the parser writes where it gives no reason, and what is meant.
_REASONS = {
    "false": "TensorRT has no such operator",
    "creator &&": "neither an operator nor a plugin of that name is known",
}
# Layers that do the arithmetic, by the names in trt.LayerType that exist in all versions or in none that lack them.
_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ATTENTION_INPUT", "ATTENTION_OUTPUT")
# Nodes of the tower itself compare frames and make plans, in float32 whatever the type of the weights; what belongs to
# the vision model (vision.layers.3.fc1/MatMul) computes in the type of the weights.
FLOAT32_SCOPE = "tower/"
# Our names of types -> those of trt.DataType.
TYPES = {d.torch: d.tensorrt for d in DTYPES.values()} | {
    name: name.upper() for name in ("int64", "int32", "bool", "uint8", "int8")
}
Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def make_logger(trt: Any) -> Any:
    """A logger that prints nothing, keeps the text of errors in `errors`, and has `last_words` for our exceptions."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(message)

        def last_words(self, count: int = 1) -> str:
            """The last errors on one line, for the end of a sentence."""
            return " ".join(" ".join(self.errors[-count:]).split())[: 300 * count] or "it does not say why"

    return Log()


def parse(trt: Any, builder: Any, onnx_path: Path, logger: Any) -> tuple[Any, Any]:
    """(network, parser) of the graph, strongly typed. The network refers to the parser's weights: keep both.

    Raises EngineError that lists every objection with node, operator and reason.
    """
    # Strong typing is a flag in TensorRT 10 and the only typing in 11.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):  # the path tells where the weights lie
        found = parser_errors(parser) or [logger.last_words()]
        if any("Failed to import initializer" in text for text in found):
            found.append(f"its weights should lie in {onnx_path.name}.data beside it")
        count = f"{parser.num_errors} objections: " if parser.num_errors > 1 else ""
        raise EngineError(f"TensorRT's parser refuses {onnx_path}: {count}{'; '.join(found)}")
    return network, parser


def parser_errors(parser: Any) -> list[str]:
    """Each objection of an OnnxParser or OnnxParserRefitter: node, operator, reason; the same one only once."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reason = " ".join(error.desc().split()).removeprefix("Assertion failed: ")
        reason = next((said for start, said in _REASONS.items() if reason.startswith(start)), reason)
        if error.node() < 0:  # the file, not a node
            found.append(reason)
            continue
        node = error.node_name() or f"node {error.node()}"
        operator = f" ({error.node_operator()})" if error.node_operator() else ""
        code = error.code()
        found.append(f"{node}{operator}: {reason} [{getattr(code, 'name', code)}]")
    return list(dict.fromkeys(found))


def check_network(trt: Any, network: Any, inputs: Sequence[Spec], outputs: Sequence[Spec], dtype: str) -> list[str]:
    """What is wrong with a parsed network: its inputs and outputs against those announced, and float32 unasked.

    dtype: of the weights, "float16". Every product of matrices that belongs to the vision model must take and give it;
    those of the tower's own arithmetic may be float32 as well.
    """
    wrong = []
    for what, expected, count, get in (
        ("input", inputs, network.num_inputs, network.get_input),
        ("output", outputs, network.num_outputs, network.get_output),
    ):
        found: dict[str, Spec] = {}
        for tensor in map(get, range(count)):
            found[tensor.name] = (tensor.name, _dtype(tensor), tuple(tensor.shape))
        for spec in expected:
            have = found.pop(spec[0], None)
            if have is None:
                wrong.append(f"it has no {what} {_show(spec)}")
            elif have != tuple(spec):
                wrong.append(f"its {what} {_show(have)} should be {_show(spec)}")
        wrong += [f"it has an {what} {_show(spec)} that is not announced" for spec in found.values()]
    return wrong + list(_unasked(trt, network, dtype))


def _unasked(trt: Any, network: Any, dtype: str) -> list[str]:
    kinds = {getattr(trt.LayerType, name) for name in _PRODUCTS if hasattr(trt.LayerType, name)}
    wrong = []
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type not in kinds:
            continue
        allowed = {dtype, "float32"} if layer.name.startswith(FLOAT32_SCOPE) else {dtype}
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        tensors += [layer.get_output(i) for i in range(layer.num_outputs)]
        types = {_dtype(tensor) for tensor in tensors if tensor is not None}
        # A mask may be boolean, indices whole numbers: only floating types are at issue.
        odd = sorted(kind for kind in types - allowed if "float" in kind)
        if odd:
            kind = str(layer.type).rpartition(".")[2]
            wrong.append(f"{layer.name} ({kind}) would compute in {' and '.join(odd)}, not in {dtype}")
    return wrong


def refit(trt: Any, engine: Any, onnx_path: Path, logger: Any) -> None:
    """Put the graph's weights into an engine built with strip_weights; there is no refitter for any other.

    Raises EngineError with every objection.
    """
    try:
        refitter = trt.Refitter(engine, logger)
    except (TypeError, RuntimeError):  # pybind11's words for a null pointer
        raise EngineError(f"it is no engine without weights: {logger.last_words()}") from None
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(onnx_path)):
        found = parser_errors(parser) or [logger.last_words()]
        raise EngineError(f"the weights of {onnx_path} do not fit the stripped engine: {'; '.join(found)}")
    missing = refitter.get_missing_weights()
    if missing:
        raise EngineError(
            f"{onnx_path} lacks {len(missing)} weights of the stripped engine ({', '.join(sorted(missing)[:3])}): it "
            "was built from another graph"
        )
    if not refitter.refit_cuda_engine():
        raise EngineError(f"the stripped engine could not take its weights: {logger.last_words()}")


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype).rpartition(".")[2]
    return next((ours for ours, theirs in TYPES.items() if theirs == name), name)


def _show(spec: Spec) -> str:
    name, dtype, shape = spec
    return f"{name} {dtype} {list(shape)}"
