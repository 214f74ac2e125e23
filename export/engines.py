"""Which engines an export builds, and building them: the graph opened by ONNX Runtime, engines by TensorRT."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from earlytom.bundle import MODEL, Bundle, EngineRecord
from earlytom.errors import ConfigError, EngineError

from .progress import Progress

if TYPE_CHECKING:
    from .job import Job

TENSORRT = ("tensorrt", "tensorrt-rtx")


def choose_engines(names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The engines to build for `--engine`, and why these.

    auto: on a card with full TensorRT, an engine tuned there; else, with TensorRT for RTX, engines for other cards,
    built ahead of time; ONNX Runtime always. Raises EngineError when one asked for by name cannot be built here,
    ConfigError when auto or none come with others.
    """
    names = tuple(dict.fromkeys(names))
    if len(names) > 1 and {"auto", "none"} & set(names):
        raise ConfigError(f"--engine {','.join(names)}: auto and none go alone")
    if names == ("none",):
        return (), "none was asked for"
    if names != ("auto",):
        for name in names:
            require(name)
        return names, "asked for"
    reasons = []
    for name in TENSORRT:
        try:
            require(name)
        except EngineError as error:
            reasons.append(str(error))
        else:
            where = "tuned on this machine's card" if name == "tensorrt" else "built ahead of time, no GPU needed"
            return ("onnxruntime", name), f"auto: {name} is here, {where}"
    return ("onnxruntime",), "auto: " + "; ".join(reasons)


def require(name: str) -> None:
    """Raise EngineError, with what to do, unless this machine can build this engine."""
    if name in TENSORRT:
        from engines.tensorrt_products import require_builder

        require_builder(name)
    elif importlib.util.find_spec("onnxruntime") is None:
        raise EngineError("the engine onnxruntime needs its package, which is not here: pip install onnxruntime")


def build_engines(job: Job, bundle: Bundle, progress: Progress) -> tuple[EngineRecord, ...]:
    """Open the bundle's graph in ONNX Runtime where that is wanted, and build the TensorRT engines beside it.

    The bundle is still being written: its manifest has no files yet. Raises EngineError.
    """
    manifest, records = bundle.manifest, []
    for name in job.engines:
        progress.step(name)
        if name == "onnxruntime":
            from engines.onnxruntime import OnnxRuntimeRunner

            OnnxRuntimeRunner(bundle.path / MODEL, manifest.inputs, manifest.outputs).close()
        else:
            from engines.tensorrt_build import build_engine

            records.append(
                build_engine(
                    bundle.path / MODEL, manifest, bundle.path, job.build_options(name),
                    progress=lambda step, name=name: progress.step(f"{name}: {step}"),
                )
            )  # fmt: skip
    return tuple(records)
