"""The intermediates of a tower in its graph: their names, their order, and the graph that shows them as outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earlytom.errors import ExportError

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from earlytom.tower import StaticTower

TRACED_KEY = "earlytom.traced"  # model metadata: the intermediates that `with_traced_outputs` can promote


def traced_names(tower: StaticTower) -> tuple[str, ...]:
    """Names of the intermediates, in the order of `flatten_trace`."""
    layers = tower.config.merge_layers
    if not layers:
        return ()
    stages = tuple(f"{kind}_{layer}" for layer in layers for kind in ("similarity", "weights", "hidden"))
    return (*stages, "similarity_final", "received")


def flatten_trace(trace: Any) -> tuple[Tensor, ...]:
    """The intermediates of a TowerTrace in the order of `traced_names`."""
    if trace.similarity is None:
        return ()
    return (*(tensor for stage in trace.stages for tensor in stage), trace.similarity, trace.received)


def with_traced_outputs(
    path: Path, names: Sequence[str] | None = None, destination: Path | None = None
) -> onnx.ModelProto:
    """The graph at `path` with the intermediates `names` (default: all) as further outputs, to see where numbers part.

    The weights are not copied: the model refers to the same data file. Give `destination`, in the same directory, to
    have a file; or load the returned model's bytes in ONNX Runtime with the session option
    session.model_external_initializers_file_folder_path set to that directory.

    Raises ExportError when a name is not traced in this graph or `destination` lies elsewhere.
    """
    import onnx

    path = Path(path)
    model = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    known = [name for name in metadata.get(TRACED_KEY, "").split(",") if name]
    wanted = known if names is None else list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        has = ", ".join(known) or "none, since nothing is merged in it"
        raise ExportError(f"{path.name} has no traced value {', '.join(unknown)}; it has {has}")
    values = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(values[name] for name in wanted)
    if destination is not None:
        if Path(destination).resolve().parent != path.resolve().parent:
            raise ExportError(f"{destination} must lie beside {path}, whose data file it shares")
        onnx.save(model, destination)
    return model
