"""The intermediates of a tower in its graph: their names, their order, and the graph that shows them as outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from earlytom.errors import ExportError
from earlytom.parity.intermediates import intermediates
from engines.bundle.manifest import MODEL

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from earlytom.tower import StaticTower, TowerTrace
    from engines.bundle.reader import Bundle

TRACED_KEY = "earlytom.traced"  # model metadata: the intermediates that `with_traced_outputs` can promote


def traced_names(tower: StaticTower) -> tuple[str, ...]:
    """Names of the intermediates, in the order of `flatten_trace`."""
    return tuple(intermediate.to_text() for intermediate in intermediates(tower.config.merge_layers))


def flatten_trace(trace: TowerTrace) -> tuple[Tensor, ...]:
    """The intermediates of a TowerTrace in the order of `traced_names`."""
    if trace.similarity is None or trace.received is None:
        return ()
    return (*(tensor for stage in trace.stages for tensor in stage), trace.similarity, trace.received)


def with_traced_outputs(
    path: Path, names: Sequence[str] | None = None, destination: Path | None = None
) -> onnx.ModelProto:
    """The graph at `path` with the intermediates `names` (default: all) as further outputs, to see where numbers part.

    The weights are not copied: the model refers to the same data file. Give `destination`, in the same directory, to
    have a file; or hand the returned model's bytes to OnnxRuntimeRunner as its `graph`.

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


def run_traced(bundle: Bundle, clips: Tensor) -> TowerTrace:
    """The bundle's graph in ONNX Runtime on the CPU with its intermediates: uint8 [V, T, H, W, 3] -> TowerTrace.

    Raises EngineError when ONNX Runtime cannot run it.
    """
    import torch

    from earlytom.tower import Stage, TowerOutputs, TowerTrace
    from engines.onnxruntime import CPU, OnnxRuntimeRunner

    manifest, path = bundle.manifest, bundle.path / MODEL
    graph = with_traced_outputs(path).SerializeToString()
    with closing(OnnxRuntimeRunner(path, manifest.inputs, manifest.outputs, providers=(CPU,), graph=graph)) as runner:
        found = {name: torch.from_numpy(array) for name, array in runner.run_named({"frames": clips.numpy()}).items()}
    names = [intermediate.to_text() for intermediate in intermediates(manifest.config.merge_layers)]
    *of_stages, similarity, received = (found[name] for name in names)
    width = len(Stage._fields)
    stages = tuple(Stage(*of_stages[k : k + width]) for k in range(0, len(of_stages), width))
    return TowerTrace(TowerOutputs(*(found[name] for name in TowerOutputs._fields)), stages, similarity, received)
