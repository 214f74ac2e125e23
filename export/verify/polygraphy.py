"""Polygraphy's side of a parity hop: its comparator's numbers, its file format, and the command that repeats a hop."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from earlytom.errors import ParityError
from earlytom.parity import TOLERANCES
from earlytom.tower import TowerOutputs

INPUTS = "inputs.json"
COMPARED = ("tokens", "newlines", "weights")  # of the values that plans allow to compare; the others would take long


def polygraphy_numbers(values: Mapping[str, tuple[Tensor, Tensor]], dtype: str) -> dict[str, dict[str, Any]]:
    """Polygraphy's metrics of each output, both sides cut to where the plans agree: name -> {metric: number, "passed"}.

    Its `simple` (largest errors), cosine_similarity and snr comparisons; passed: what it says of them at the tolerances
    of `dtype`. Numbers that are not finite are null.
    """
    from polygraphy.comparator import (
        Comparator,
        CosineSimilarityCompareFunc,
        IterationResult,
        RunResults,
        SimpleCompareFunc,
        SnrCompareFunc,
    )
    from polygraphy.logger import G_LOGGER

    limit = TOLERANCES[dtype]
    chosen = {name: pair for name, pair in values.items() if name in COMPARED and pair[0].numel()}
    if not chosen:
        return {}
    results = RunResults()
    for side, runner in enumerate(("reference", "actual")):
        outputs = {name: pair[side].numpy() for name, pair in chosen.items()}
        results.append((runner, [IterationResult(outputs, runner_name=runner)]))
    atol = {
        name: math.inf if limit.tokens is None else limit.tokens * max(1.0, float(a.square().mean().sqrt()))
        for name, (a, _) in chosen.items()
    }
    functions = [
        SimpleCompareFunc(check_error_stat="max", atol=atol | {"weights": limit.weights}, rtol=0.0),
        CosineSimilarityCompareFunc(cosine_similarity_threshold=limit.cosine),
        SnrCompareFunc(snr_threshold=-math.inf),  # for its number
    ]
    found: dict[str, dict[str, Any]] = {}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for accuracy in Comparator.compare_accuracy(results, compare_func=functions):
            for iterations in accuracy.values():
                for name, result in iterations[0].items():
                    entry = found.setdefault(name, {"passed": True})
                    entry["passed"] = entry["passed"] and bool(result)
                    entry |= {metric: _plain(value) for metric, value in result.metric_values().items()}
    return found


def save_inputs(directory: Path, frames: Tensor) -> None:
    """Write the clip uint8 [V, T, H, W, 3] where `polygraphy run --load-inputs` reads it. Raises ParityError."""
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            save_json([{"frames": frames.cpu().numpy()}], str(directory / INPUTS))
    except OSError as error:
        raise ParityError(f"the tensors could not be saved in {directory}: {error.strerror}") from error


def save_outputs(directory: Path, backend: str, outputs: TowerOutputs) -> None:
    """Write what a backend gave, for `polygraphy run --load-outputs`. bfloat16 is written as float32."""
    import torch
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.logger import G_LOGGER

    arrays = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
        for name, value in outputs._asdict().items()
    }
    results = RunResults()
    results.append((backend, [IterationResult(arrays, runner_name=backend)]))
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results.save(str(directory / outputs_name(backend)))
    except OSError as error:
        raise ParityError(f"the tensors could not be saved in {directory}: {error.strerror}") from error


def outputs_name(backend: str) -> str:
    return f"outputs.{backend}.json"


def repeat_command(model: Path | str, reference: str, directory: Path, dtype: str, rms: float) -> str:
    """The command that runs the graph on the saved inputs in ONNX Runtime and compares it with saved outputs.

    rms: of the tokens, the scale of their tolerance. Polygraphy knows nothing of plans: where a near-tie flipped a
    choice, its comparison of whole outputs fails.
    """
    limit = TOLERANCES[dtype]
    if limit.tokens is not None:
        test = f"--check-error-stat max --rtol 0 --atol {limit.weights:g} tokens:{limit.tokens * max(1.0, rms):.3g}"
    else:
        test = f"--compare cosine_similarity --cosine-similarity-threshold {limit.cosine:g}"
    files = f"--load-inputs {_quoted(directory / INPUTS)} --load-outputs {_quoted(directory / outputs_name(reference))}"
    return f"polygraphy run {_quoted(model)} --onnxrt {files} {test}"


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
