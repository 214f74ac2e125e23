"""A bundle's graph in ONNX Runtime: on any CPU, and on a GPU through the providers that the installed package has.

`import onnxruntime` here is ONNX Runtime itself, not this module; it happens inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from earlytom.errors import BundleError, EngineError, first_line
from earlytom.tower import TowerOutputs

from .bundle.manifest import MODEL, TensorSpec
from .bundle.reader import Bundle
from .runner import Closing, Frames, OpenOptions, Runner, check_inputs

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# ONNX Runtime's names of types -> ours, and ours -> what IOBinding takes (NumPy has no bfloat16: ONNX's number for it).
_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}
_BFLOAT16 = 16


def _package() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime cannot be imported ({first_line(error)}): pip install onnxruntime, or onnxruntime-gpu"
        ) from None
    return onnxruntime


def _spec(value: Any) -> TensorSpec:
    name = _TYPES.get(value.type, value.type.removeprefix("tensor(").removesuffix(")"))
    return TensorSpec(value.name, name, tuple(value.shape))


def _element(dtype: str) -> Any:
    return _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type


def default_providers(device: str | None = None) -> tuple[str, ...]:
    """Providers for "cpu", "cuda" or "cuda:1"; None: CUDA where the package has it and torch sees a card.

    TensorRT's provider compiles for minutes and is used only when it is named. Raises EngineError.
    """
    onnxruntime = _package()
    has_cuda = CUDA in onnxruntime.get_available_providers()
    if device is None:
        return (CUDA, CPU) if has_cuda and torch.cuda.is_available() else (CPU,)
    if device == "cpu":
        return (CPU,)
    if torch.device(device).type != "cuda":
        raise EngineError(f"ONNX Runtime does not run on the device {device!r} here, it must be cpu or cuda")
    if not has_cuda:
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} as installed has no CUDA provider: "
            "pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    return (CUDA, CPU)


def _card(device: str | None) -> int:
    """The number of the card that `device` names; where it gives none, of torch's current one."""
    index = torch.device(device).index if device else None
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return index


class OnnxRuntimeRunner(Closing):
    """A session on a graph with all shapes static. ONNX Runtime's sessions may be run by several threads at once.

    model_path: a graph with the tensors `inputs` and `outputs`; it may have further outputs, which `run_named` gives.
    providers: names in order of preference, the CPU is added last; threads: inside one operator on a CPU, default one
    for each core; graph: runs in place of the one at model_path, with the weights that lie there. Frames and outputs
    are handed over by address. Raises BundleError when the file is not there, EngineError when it cannot be loaded or
    is another graph.
    """

    name = "onnxruntime"
    thread_safe = True

    def __init__(
        self, model_path: Path | str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *,
        providers: Sequence[str] | None = None, threads: int | None = None, device: str | None = None,
        graph: bytes | None = None,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.model_path = Path(model_path)
        if not self.model_path.is_file():
            raise BundleError(f"the graph {self.model_path} does not exist")
        wanted = list(providers) if providers is not None else list(default_providers(device))
        self._session: Any = self._load(wanted + [CPU] * (CPU not in wanted), threads, device, graph)
        self._check_graph()
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        refused = [name for name in wanted if name not in self.providers]
        if refused and (providers is not None or device is not None):
            raise EngineError(
                f"ONNX Runtime could not start {', '.join(refused)} (its CUDA or cuDNN libraries are missing or of "
                f"another version) and would run on {', '.join(self.providers)} instead"
            )
        self._on_gpu = self.providers[0] in (CUDA, TENSORRT)
        self.device = torch.device("cuda", _card(device)) if self._on_gpu else torch.device("cpu")
        self.why = f"onnxruntime, {self.providers[0].removesuffix('ExecutionProvider')}"

    def _load(self, providers: list[str], threads: int | None, device: str | None, graph: bytes | None) -> Any:
        onnxruntime = _package()
        available = onnxruntime.get_available_providers()
        missing = [name for name in providers if name not in available]
        if missing:
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} as installed has no {', '.join(missing)}: it has "
                f"{', '.join(available)}; onnxruntime-gpu has CUDA and TensorRT"
            )
        if providers == [CPU] and any(spec.dtype == "bfloat16" for spec in self.outputs):
            raise EngineError(
                "ONNX Runtime has no bfloat16 kernels for CPUs: export with --dtype fp16 or fp32, or run the bundle's "
                "TensorRT engine"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong comes out as an exception, or is looked for above
        if threads is not None:
            if threads < 1:
                raise EngineError(f"threads is {threads}, it must be at least 1")
            options.intra_op_num_threads = threads
        if graph is not None:
            folder = str(self.model_path.parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        # Float32 products may use TF32 there, with 10 bits of mantissa, unless told not to: plans would flip.
        own = {CUDA: {"use_tf32": 0}, TENSORRT: {}}
        with_options = [(n, {"device_id": _card(device), **own[n]}) if n in own else n for n in providers]
        try:
            return onnxruntime.InferenceSession(graph or self.model_path, sess_options=options, providers=with_options)
        except Exception as error:  # its exceptions share no base
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {self.model_path}, it is damaged or uses what "
                f"this version lacks: {first_line(error)}"
            ) from error

    def _check_graph(self) -> None:
        """Raise EngineError unless the graph has exactly the inputs, and at least the outputs, that were announced."""
        given = {spec.name: spec for spec in map(_spec, self._session.get_inputs())}
        made = {spec.name: spec for spec in map(_spec, self._session.get_outputs())}
        wrong = [f"{spec}" for spec in self.inputs if given.pop(spec.name, None) != spec]
        wrong += [f"{spec}" for spec in self.outputs if made.get(spec.name) != spec]
        if wrong or given:
            unannounced = f" and takes {', '.join(given)} besides" if given else ""
            raise EngineError(
                f"the graph {self.model_path} is not the announced one: it lacks {', '.join(wrong) or 'nothing'}"
                + unannounced
            )

    def run(self, frames: Frames) -> TowerOutputs:
        """As Runner.run; the outputs lie on `device`."""
        check_inputs(self.inputs, {"frames": frames})
        session = self._open_session()
        if isinstance(frames, np.ndarray):
            frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
        frames = frames.to(self.device).contiguous()
        results = {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device)
            for spec in self.outputs
        }
        binding = session.io_binding()
        (spec,) = self.inputs
        place = self.device.type, self.device.index or 0
        binding.bind_input(spec.name, *place, _element(spec.dtype), list(spec.shape), frames.data_ptr())
        for spec in self.outputs:
            address = results[spec.name].data_ptr()
            binding.bind_output(spec.name, *place, _element(spec.dtype), list(spec.shape), address)
        try:
            if self._on_gpu:  # ONNX Runtime has a stream of its own
                torch.cuda.current_stream(self.device).synchronize()
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            else:
                session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on {self.model_path}: {first_line(error)}") from error
        return TowerOutputs(**results)

    def run_named(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of the graph by name, those beside the tower's included, in the graph's order."""
        check_inputs(self.inputs, feeds)
        session = self._open_session()
        names = [value.name for value in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, dict(feeds))))
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on {self.model_path}: {first_line(error)}") from error

    def _open_session(self) -> Any:
        session = self._session
        if session is None:
            raise EngineError("the onnxruntime engine was closed: open it again")
        return session

    def close(self) -> None:
        self._session = None


def probe(name: str) -> str:
    """See engines.runner."""
    onnxruntime = _package()
    providers = onnxruntime.get_available_providers()
    has = [p.removesuffix("ExecutionProvider") for p in (TENSORRT, CUDA, CPU) if p in providers]
    return f"onnxruntime {onnxruntime.__version__} with {', '.join(has)}"


def open_bundle(name: str, bundle: Bundle, options: OpenOptions) -> Runner:
    manifest = bundle.manifest
    if MODEL not in manifest.files:
        raise EngineError(f"the bundle {bundle.path} holds no {MODEL}")
    return OnnxRuntimeRunner(
        bundle.file(MODEL), manifest.inputs, manifest.outputs,
        providers=options.providers, threads=options.threads, device=options.device,
    )
