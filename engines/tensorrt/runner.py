"""Run a bundle's TensorRT engine: torch tensors in and out by address, on the caller's stream, replayed as CUDA graphs.

Both products, see engines/products.py. What may be loaded is decided in guard.py, one context is in
context.py, kernels compiled at load are kept by cache.py.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import cuda

from earlytom.errors import BundleError, EngineError
from earlytom.tower import TowerOutputs

from ..bundle.manifest import MODEL, EngineRecord, TensorSpec
from ..bundle.reader import Bundle
from ..cards import Card, current_card
from ..products import import_product, product_of
from ..runner import Closing, Frames, OpenOptions, Runner, check_inputs
from .cache import CacheFile, cache_path
from .context import ExecutionSlot, SlotPool
from .guard import choose_record, library_objection, rebuild_command
from .network import TYPES, make_logger, refit


class LoadedEngine(NamedTuple):
    """A deserialised engine and what must outlive it. trt: the product's module; logger: see make_logger."""

    trt: Any
    engine: Any
    runtime: Any
    logger: Any


class TensorRTRunner(Closing):
    """A deserialised engine as a Runner. Threads share it: each call has an execution context to itself.

    loaded: an engine whose tensors are exactly `inputs` and `outputs`; contexts: how many calls run at once at most,
    further ones wait, and the second context is made when it is first needed; cuda_graph: capture one call and replay
    it from then on; cache: where TensorRT for RTX keeps what it compiles. Opening makes a context and runs it once.

    Frames on the card are read where they lie, or copied on the card into the graph's input; frames elsewhere are moved
    once. Outputs are copies on the card that belong to the caller, ready in the order of its current stream. Raises
    EngineError when the engine is another one than announced or does not run.
    """

    thread_safe = True

    def __init__(
        self, name: str, loaded: LoadedEngine, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *,
        device: torch.device, cuda_graph: bool = True, contexts: int = 2, cache: CacheFile | None = None,
        why: str = "",
    ) -> None:
        self.name, self.inputs, self.outputs, self.device = name, inputs, outputs, device
        check_engine(loaded.trt, loaded.engine, inputs, outputs)
        self._loaded: LoadedEngine | None = loaded
        self._trt, self._logger = loaded.trt, loaded.logger
        self.engine: Any = loaded.engine
        own_graphs = product_of(name).ahead_of_time  # TensorRT for RTX captures by itself
        self._graph = ("library" if own_graphs else "torch") if cuda_graph else "none"
        self._config: Any = None
        self._cache: Any = None
        if own_graphs:
            self._configure(cache)
        with cuda.device(device):
            self._pool = SlotPool(self._make_slot, contexts)
        if cache is not None:
            self._keep_compiled(cache)
        (first,) = self._pool.slots
        graph = {"none": "no CUDA graph", "library": "CUDA graph", "torch": "CUDA graph"}[self._graph]
        self.why = f"{why or name}, {first.note or graph}"

    @property
    def device_memory_bytes(self) -> int:
        """On the card for all contexts made so far: activations and buffers. The weights, about as large as the
        engine's file, come on top."""
        return sum(int(self.engine.device_memory_size_v2) + slot.buffer_bytes for slot in self._pool.slots)

    @property
    def replays_graph(self) -> bool:
        """Whether calls are replayed from a CUDA graph, as far as can be seen from here."""
        return self._graph == "library" or any(slot.captured for slot in self._pool.slots)

    def run(self, frames: Frames) -> TowerOutputs:
        """As Runner.run; the outputs lie on `device`."""
        check_inputs(self.inputs, {"frames": frames})
        if isinstance(frames, np.ndarray):
            frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
        with self._pool.take() as slot, cuda.device(self.device):
            return TowerOutputs(**slot.run(frames))

    def close(self) -> None:
        self._pool.close()
        self._config = self._cache = self.engine = self._loaded = None

    def _make_slot(self) -> ExecutionSlot:
        engine = self.engine
        if engine is None:
            raise EngineError(f"the {self.name} engine was closed: open it again")
        with cuda.device(self.device):
            context = engine.create_execution_context() if self._config is None else (
                engine.create_execution_context(self._config)
            )
            if context is None:
                raise EngineError(f"the engine cannot be given memory to run in: {self._logger.last_words()}")
            return ExecutionSlot(
                context, self.inputs, self.outputs, self.device, graph=self._graph, last_error=self._logger.last_words,
                keep=(self._loaded, self._cache, self._config),
            )

    def _configure(self, cache: CacheFile | None) -> None:
        """How TensorRT for RTX is to run contexts, and where it puts what it compiles."""
        self._config = self.engine.create_runtime_config()
        strategy = self._trt.CudaGraphStrategy
        graph = strategy.WHOLE_GRAPH_CAPTURE if self._graph == "library" else strategy.DISABLED
        self._config.cuda_graph_strategy = graph
        if cache is None:
            return
        self._cache = self._config.create_runtime_cache()
        with cuda.device(self.device):  # it compares the card with that of the kept kernels
            kept = cache.read()
            if kept is not None and not self._cache.deserialize(kept):
                self._cache.reset()
        self._config.set_runtime_cache(self._cache)

    def _keep_compiled(self, cache: CacheFile) -> None:
        if self._cache is None:
            return
        content = self._cache.serialize()
        if content is not None and (payload := bytes(memoryview(content))) and payload != cache.read():
            cache.write(payload)


def check_engine(
    trt: Any, engine: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    """Raise EngineError unless the engine's tensors are exactly these: names, types, shapes, direction."""
    found = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        kind = str(engine.get_tensor_dtype(name)).rpartition(".")[2]
        taken = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        found[name] = (taken, kind, tuple(engine.get_tensor_shape(name)))
    wrong = []
    for taken, specs in ((True, inputs), (False, outputs)):
        for spec in specs:
            have = found.pop(spec.name, None)
            if have != (taken, TYPES.get(spec.dtype), spec.shape):
                wrong.append(f"{spec} is {'missing' if have is None else f'{have[1]} {list(have[2])}'}")
    wrong += [f"{name} is not announced" for name in found]
    if wrong:
        raise EngineError(f"the engine is not the one that the manifest describes: {'; '.join(wrong)}")


def probe(name: str) -> str:
    """See engines.runner."""
    product, module = product_of(name), import_product(name)
    card = current_card()
    if card is None:
        raise EngineError(
            f"{product.title} {module.__version__} is here, but no CUDA device: its engines run on a machine with one"
        )
    _cuda_device(None, card)
    return f"{product.title} {module.__version__} on {card.name} ({card.target})"


def open_bundle(name: str, bundle: Bundle, options: OpenOptions) -> Runner:
    """See engines.runner."""
    index = torch.device(options.device).index if options.device else None
    if index is None:
        index = cuda.current_device() if cuda.is_available() else 0
    card = current_card(index)
    if card is None and index > 0:
        raise EngineError(f"this machine has no CUDA device with the number {index}, they are counted from 0")
    if card is None:
        choose_record(bundle, name, None, None)  # says so
    assert card is not None
    trt = import_product(name)
    record = choose_record(bundle, name, card, trt.__version__)
    device = _cuda_device(options.device, card)
    loaded = load_engine(trt, bundle, record, card, device)
    product = product_of(name)
    cache = None
    if product.ahead_of_time:
        digest = bundle.manifest.files[record.file].sha256
        cache = CacheFile(cache_path(bundle.file(record.file), trt.__version__, card), digest)
    return TensorRTRunner(
        name, loaded, bundle.manifest.inputs, bundle.manifest.outputs, device=device, cache=cache,
        cuda_graph=options.cuda_graph, contexts=options.contexts,
        why=f"{product.title} {trt.__version__}, {record.file} on {card.name}{_elsewhere(record, card)}",
    )


def load_engine(trt: Any, bundle: Bundle, record: EngineRecord, card: Card, device: torch.device) -> LoadedEngine:
    """The engine of a record that fits `card`; the bytes that are deserialised are those that were hashed.

    Raises BundleError when the file is not the manifest's, EngineError when the library refuses it.
    """
    data = _read(bundle, record.file)
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    title = product_of(record.product).title
    again = rebuild_command(bundle, record.product, card.target)
    with cuda.device(device):
        objection = library_objection(trt, runtime, data)
        if objection is not None:
            raise EngineError(f"{title} {trt.__version__} refuses {record.file} here, {objection}; built anew: {again}")
        if record.version_compatible:
            runtime.engine_host_code_allowed = True  # it brings the library that it runs with
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            said = f"cannot load {record.file} on {card.name} ({logger.last_words()})"
            raise EngineError(f"{title} {trt.__version__} {said}; built anew: {again}")
        del data
        if record.settings.strip_weights:
            bundle.verify(*(file for file in (MODEL, f"{MODEL}.data") if file in bundle.manifest.files))
            refit(trt, engine, bundle.file(MODEL), logger)
    return LoadedEngine(trt, engine, runtime, logger)


def _read(bundle: Bundle, name: str) -> bytes:
    """The file's content, when it is what the manifest vouches for. Raises BundleError."""
    path, record = bundle.file(name), bundle.manifest.files[name]
    bundle.verify(name, content=False)  # missing, or of another size
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"the bundle {bundle.path} is damaged: {name} cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BundleError(
            f"the bundle {bundle.path} is damaged: {name} was changed (SHA-256), so it is not loaded; copy or export "
            "it again"
        )
    return data


def _cuda_device(asked: str | None, card: Card) -> torch.device:
    """The torch device that `card` is. Raises EngineError when torch cannot use it."""
    device = torch.device(asked or "cuda")
    if device.type != "cuda":
        raise EngineError(f"TensorRT does not run on the device {asked!r}, it must be cuda or cuda:1 and the like")
    if not cuda.is_available():
        built = torch.version.cuda
        lacks = "is built without CUDA" if built is None else f"is built for CUDA {built}, the driver has {card.cuda}"
        raise EngineError(
            f"the machine has a {card.name}, but torch {torch.__version__} cannot use it, it {lacks}: install the "
            "torch that fits the driver, see pytorch.org"
        )
    return torch.device("cuda", cuda.current_device() if device.index is None else device.index)


def _elsewhere(record: EngineRecord, card: Card) -> str:
    return f" (tuned on {record.gpu})" if record.gpu not in (None, card.name) else ""
