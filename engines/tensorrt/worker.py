"""The process that builds one engine: a request on standard input, a line of JSON for each step on standard output.

A process of its own because TensorRT orders some of what it writes by where objects lie in memory: only a fresh process
writes the same bytes every time. It also gives the builder's memory back, can be ended at any moment, and a crash of
the builder does not take the caller with it. Nothing heavy but TensorRT is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from earlytom.errors import EngineError
from earlytom.files import replacing

from ..cards import Card, current_card
from ..products import Product, check_target, import_product, module_version, product_of
from .network import check_network, make_logger, parse

LEVELS = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}


def main() -> int:
    """Read a request, build, answer. Whatever TensorRT prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")  # in one piece: the builder may report from several threads
        replies.flush()

    try:
        request = json.load(sys.stdin)
        reply(done=build(request, lambda step: reply(step=step)))
    except EngineError as error:
        reply(error=str(error))
    except BrokenPipeError:  # who asked is gone
        return 1
    return 0


def build(request: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Build what the request says and write it to request["destination"].

    Returns what the manifest records: version, targets, gpu, driver, cuda. Raises EngineError.
    """
    product, options, path = product_of(request["product"]), request["options"], Path(request["onnx"])
    progress(f"load {product.title}")
    trt = import_product(product.name)
    if request["attention"] and module_version(trt) < product.attention_since:
        raise EngineError(
            f"{product.title} {trt.__version__} does not know the Attention operator of this graph: "
            f"{product.install.replace('install', 'install --upgrade')}, or export with --opset 20"
        )
    card = None if product.ahead_of_time else current_card()
    logger = make_logger(trt)
    builder = make_builder(trt, product, logger, card)
    progress("parse")
    network, parser = parse(trt, builder, path, logger)
    inputs, outputs = (
        [(name, dtype, tuple(shape)) for name, dtype, shape in request[key]] for key in ("inputs", "outputs")
    )
    wrong = check_network(trt, network, inputs, outputs, request["dtype"])
    if wrong:
        raise EngineError(f"{path} is not the graph of its manifest: {'; '.join(wrong)}")

    targets = tuple(request["targets"])
    if card is not None:
        if targets and targets != (card.target,):
            raise EngineError(
                f"TensorRT builds for the card in this machine, {card.name} ({card.target}), not for "
                f"{', '.join(targets)}: build there, or with --engine tensorrt-rtx"
            )
        targets = (card.target,)
    config = builder.create_builder_config()
    configure(trt, config, product, options, targets)
    cache = _open_cache(config, product, options, trt.__version__, card)
    monitor = make_monitor(trt, progress)
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if engine is None:
        said = logger.last_words(3)
        raise EngineError(f"{product.title} {trt.__version__} could not build an engine from {path}: {said}")
    progress("write")
    try:
        with open(request["destination"], "wb") as file:
            file.write(memoryview(engine))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EngineError(f"the engine could not be written to {request['destination']}: {error.strerror}") from error
    if cache is not None:
        _write_cache(config, cache)
    del parser
    return {
        "version": trt.__version__, "targets": targets, "gpu": card and card.name, "driver": card and card.driver,
        "cuda": card and card.cuda,
    }


def make_builder(trt: Any, product: Product, logger: Any, card: Card | None) -> Any:
    """trt.Builder. Raises EngineError when the product needs a card and finds none that it can use."""
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError):  # pybind11's words for a null pointer
        builder = None
    if builder is None or not (card or product.ahead_of_time):
        said = re.search(r"CUDA \w+ failure with error: \d+", " ".join(logger.errors))
        raise no_card(product, said[0] if said else "")
    return builder


def no_card(product: Product, said: str = "") -> EngineError:
    return EngineError(
        f"{product.title} builds on the card that it builds for and finds none here that it can use"
        f"{f' ({said})' if said else ''}: build on the machine with the card, or with --engine tensorrt-rtx, which "
        "needs no GPU"
    )


def configure(trt: Any, config: Any, product: Product, options: Mapping[str, Any], targets: tuple[str, ...]) -> None:
    """Set everything that `options` (BuildOptions as a dictionary) asks for. Raises EngineError for a wrong target."""
    flag = trt.BuilderFlag
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace"])
    if options["optimization_level"] is not None:
        config.builder_optimization_level = options["optimization_level"]
    # TensorRT lets float32 products use TF32, with 10 bits of mantissa, unless told not to: plans would flip.
    (config.set_flag if options["tf32"] else config.clear_flag)(flag.TF32)
    if options["detailed"]:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options["version_compatible"]:
        config.set_flag(flag.VERSION_COMPATIBLE)
    if options["strip_weights"]:
        config.set_flag(flag.STRIP_PLAN)
        config.set_flag(flag.REFIT_IDENTICAL)  # the same weights come back: nothing has to be built more general
    level = options["hardware_compatibility"]
    if level != "none":
        if not hasattr(trt.HardwareCompatibilityLevel, LEVELS[level]):
            raise EngineError(f"TensorRT {trt.__version__} does not have the compatibility level {level}")
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, LEVELS[level])
    if product.ahead_of_time:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            check_target(product, target)
            capability = getattr(trt.ComputeCapability, target.upper(), None)
            if capability is None or not config.set_compute_capability(capability, index):
                raise EngineError(f"{product.title} {trt.__version__} does not build for {target}")


def make_monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    """An IProgressMonitor that reports phases to `progress` and cancels when that raises; `failure`: what it raised.

    An exception must not pass through the builder, which is not written to survive one.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.steps.get(phase_name, 0)
            if total >= 100 and (step + 1) * 20 // total > step * 20 // total:  # every 5 % of the long ones
                self._report(f"{phase_name} {(step + 1) * 100 // total} %")
            return self.failure is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def _report(self, text: str) -> None:
            try:
                if self.failure is None:
                    progress(text)
            except BaseException as error:
                self.failure = error

    return Monitor()


def cache_name(product: Product, version: str, card: Card) -> str:
    """A timing cache is worth something to one version on one model of card: both are in its name."""
    return f"timing.{product.suffix}-{version}.{card.file_part}.cache"


def _open_cache(config: Any, product: Product, options: Mapping[str, Any], version: str, card: Card | None) -> Any:
    """Give the builder what earlier builds measured; the file to write to, or None where the product has no cache."""
    if options["timing_cache"] is None or not product.timing_cache or card is None:
        return None
    path = Path(options["timing_cache"]) / cache_name(product, version, card)
    try:
        earlier = path.read_bytes()
    except OSError:
        earlier = b""
    for content in (earlier, b""):  # a damaged or foreign one is not taken: start anew
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return path
    return None


def _write_cache(config: Any, path: Path) -> None:
    """Best effort: the engine is there already, and a cache only saves time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
