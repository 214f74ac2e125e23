"""What the rules look at: a ModelProto with look-ups by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


class Graph:
    """A ModelProto with the look-ups that the rules need."""

    def __init__(self, model: onnx.ModelProto, dtype: str, directory: Path | None) -> None:
        import onnx

        graph = model.graph
        self.proto, self.nodes, self.dtype, self.directory = graph, list(graph.node), dtype, directory
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value for value in graph.input if value.name not in self.initializers]
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in filter(None, dict.fromkeys(node.input)):
                self.users.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self.types[value.name] = onnx.TensorProto.DataType.Name(tensor.elem_type)
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            self.shapes[value.name] = tuple(dims) if tensor.HasField("shape") and min(dims, default=0) >= 0 else None
        for name, tensor in self.initializers.items():
            self.types[name] = onnx.TensorProto.DataType.Name(tensor.data_type)
            self.shapes[name] = tuple(tensor.dims)
        self.names = {id(node): node.name or f"{node.op_type}#{i}" for i, node in enumerate(self.nodes)}

    def type(self, name: str) -> str:
        return self.types.get(name, "UNDEFINED")

    def is_constant(self, name: str) -> bool:
        return name in self.initializers or (name in self.producer and self.producer[name].op_type == "Constant")

    def before(self, name: str, *, skip_cast: bool = False) -> onnx.NodeProto | None:
        """The node that makes a value; a Cast is looked through on request."""
        node = self.producer.get(name)
        if skip_cast and node is not None and node.op_type == "Cast":
            return self.producer.get(node.input[0])
        return node

    def softmax_product(self, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
        """The second product of an attention: a MatMul that takes the softmax on its left, through a Cast at most."""
        values = [softmax.output[0]]
        values += [user.output[0] for user in self.users.get(values[0], []) if user.op_type == "Cast"]
        users = (user for value in values for user in self.users.get(value, []) if user.input[0] == value)
        return next((user for user in users if user.op_type == "MatMul"), None)

    def size(self, tensor: onnx.TensorProto) -> int:
        import onnx

        count = 1
        for dim in tensor.dims:
            count *= dim
        return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)

    def digest(self, tensor: onnx.TensorProto) -> bytes:
        """Hash of a tensor's contents, read from the data file where it lies there."""
        import onnx

        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return hashlib.sha256(onnx.numpy_helper.to_array(tensor).tobytes()).digest()
        place = {entry.key: entry.value for entry in tensor.external_data}
        if Path(place["location"]).name != place["location"]:
            raise ValueError(f"its file {place['location']} does not lie beside the graph")
        with open((self.directory or Path()) / place["location"], "rb") as file:
            file.seek(int(place.get("offset", 0)))
            content = file.read(int(place.get("length", self.size(tensor))))
        if len(content) != self.size(tensor):
            raise ValueError(f"{place['location']} holds {len(content)} of its {self.size(tensor)} bytes")
        return hashlib.sha256(content).digest()


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute; text comes as str."""
    import onnx

    for entry in node.attribute:
        if entry.name == name:
            value = onnx.helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default
