"""The parity ladder of a bundle: oracle → static tower → ONNX Runtime → every further engine that this machine runs.

Each hop changes one thing: the first the method's form, in float32 on both sides; the second the backend and the dtype;
the others the engine. A hop's numbers are taken where the plans agree (earlytom/parity/) and judged by the tolerances
of the bundle's dtype, and so are the language model's answers to both sides (interview.py); what this machine cannot
run is listed as not run, with the reason, never as passed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from earlytom.checkpoint import load
from earlytom.dtypes import torch_dtype
from earlytom.errors import ConfigError, EngineError, InputError
from earlytom.parity import (
    Hop,
    HopReport,
    ParityReport,
    ScoreErrors,
    VideoTrace,
    align,
    judge,
    measure,
    oracle_hop,
    score_errors,
    sources,
    split_trace,
)
from earlytom.parity.oracle import ORACLE, STATIC
from earlytom.tower import StaticTower, TowerOutputs, TowerTrace
from earlytom.vision.siglip import Vision
from engines.bundle.manifest import MODEL
from engines.bundle.reader import Bundle, digest_file, read_bundle
from engines.opening import open_runner
from engines.products import ENGINES, PRODUCTS

from ..onnx.traced import run_traced
from ..settings import Questions
from .interview import Interview, Seen
from .polygraphy import polygraphy_numbers, repeat_command, save_inputs, save_outputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ONNXRUNTIME = "onnxruntime"


def verify_bundle(
    bundle: Bundle | Path | str, frames: Tensor | NDArray[np.uint8], *, checkpoint: str | Path | None = None,
    vision: Vision | None = None, engines: Sequence[str] | None = None, save_tensors: Path | None = None,
    questions: Questions | None = None, progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Run the ladder on one clip uint8 [T, H, W, 3], or one for each video of the bundle's batch [V, T, H, W, 3].

    vision: the weights in float32; without it they are read from checkpoint (default: the one in the manifest).
    engines: default ONNX Runtime and what the bundle holds. save_tensors: a directory for inputs and outputs in
    Polygraphy's format. questions: to compare the answers to; the language model is then read from the checkpoint too.
    progress: called with the name of each step. A bundle that is being written, whose manifest lists no files yet, can
    be given as a Bundle.

    Raises BundleError, CheckpointError (other weights than the bundle's), EngineError (no such engine), InputError.
    """
    bundle = _vouched(bundle) if isinstance(bundle, Bundle) else read_bundle(bundle)
    manifest = bundle.manifest
    if engines is None:
        held = {record.product for record in manifest.engines}
        engines = (ONNXRUNTIME, *(name for name in PRODUCTS if name in held))
    unknown = [name for name in engines if name not in ENGINES]
    if unknown:
        raise EngineError(f"there is no engine {', '.join(unknown)}, it must be one of {', '.join(ENGINES)}")
    vision = _weights(bundle, checkpoint) if vision is None else vision
    if vision.geometry != manifest.geometry or vision.dtype != torch.float32:
        raise InputError(
            f"the weights for verifying are {vision.dtype} of {vision.geometry}, they must be float32 and of the "
            f"bundle's {manifest.geometry}"
        )
    interview = Interview(bundle, questions, checkpoint) if questions is not None else None
    clips = _clips(bundle, frames)
    return _Ladder(bundle, vision, clips, interview, save_tensors, progress or (lambda step: None)).run(engines)


class _Ladder:
    """One run of `verify_bundle`: the clip, the weights and what the last backend gave."""

    def __init__(
        self, bundle: Bundle, vision: Vision, clips: Tensor, interview: Interview | None, directory: Path | None,
        progress: Callable[[str], None],
    ) -> None:
        self.bundle, self.vision, self.clips, self.progress = bundle, vision, clips, progress
        self.directory = Path(directory) if directory is not None else None
        self.config, self.shapes, self.dtype = bundle.manifest.config, bundle.manifest.shapes, bundle.manifest.dtype
        self.errors: ScoreErrors | None = None  # of the bundle's dtype against float32, once known
        self.interview = interview
        self.seen: dict[str, Sequence[Seen]] = {}  # backend -> what it made of each clip that is asked about

    def run(self, engines: Sequence[str]) -> ParityReport:
        hops = [self._oracle_hop()]
        self.progress("static tower")
        tower = StaticTower(self.vision, self.config, batch=len(self.clips)).eval()
        with torch.no_grad():
            trace = tower.trace(self.clips.to(self.vision.device))
        if self.directory is not None:
            save_inputs(self.directory, self.clips)
            save_outputs(self.directory, STATIC, trace.outputs)
        static = self._split(trace)
        self._keep(STATIC, trace, tower.trace)
        del tower, trace
        reference: tuple[str, Sequence[VideoTrace]] = (STATIC, static)
        if ONNXRUNTIME not in engines and self.dtype != "fp32":
            hops.append(self._dtype_hop(static))
        for engine in sorted(engines, key=lambda name: name != ONNXRUNTIME):
            self.progress(engine)
            hop, videos = self._engine_hop(engine, reference, static, scores=len(engines) > 1)
            hops.append(hop)
            if engine == ONNXRUNTIME and videos is not None and all(video.stages for video in videos):
                reference = (engine, videos)
            elif engine == ONNXRUNTIME and videos is None and self.dtype != "fp32":
                hops.append(self._dtype_hop(static))
        return ParityReport(tuple(hops))

    def _oracle_hop(self) -> HopReport:
        """The method: the oracle against the static tower at the budgets that the oracle itself arrives at."""
        self.progress(ORACLE)
        try:
            found = oracle_hop(self.vision, self.clips[0], self.config)
        except ConfigError as error:
            return HopReport(ORACLE, STATIC, "fp32", "not run", (str(error),))
        kept = sorted({len(positions) for positions in found.expected.positions})
        left = ", ".join(map(str, found.config.frame_budgets))
        note = f"the oracle left {left} frames of this clip, and the static tower was given these budgets"
        if kept != [found.shapes.keep]:
            note += (
                f"; the oracle kept {' or '.join(map(str, kept))} patches of a frame (its rounding), the static tower "
                f"{found.shapes.keep}: tokens are compared where both kept them"
            )
        if len(self.clips) > 1:
            note += "; the first video of the batch"
        if self.interview is not None:
            note += "; answers are to the tokens that both kept"
        report = self._report(found.numbers, found.aligned.values, note if found.expected.stages else "")
        if self.interview is None:
            return report
        values = [found.aligned.values[name] for name in ("tokens", "newlines") if name in found.aligned.values]
        expected, actual = (torch.cat(side) for side in zip(*values))
        return self.interview.report(report, [expected], [actual])

    def _engine_hop(
        self, engine: str, reference: tuple[str, Sequence[VideoTrace]], static: Sequence[VideoTrace], *, scores: bool
    ) -> tuple[HopReport, Sequence[VideoTrace] | None]:
        """One engine against the last backend that shows its scores, and the engine's own videos."""
        name, expected = reference
        try:
            outputs = self._outputs(engine)
        except EngineError as error:
            # Where the bundle lies now, perhaps in a temporary directory, is nothing to keep in its manifest.
            reason = str(error).replace(str(self.bundle.path), "BUNDLE")
            return HopReport(name, engine, self.dtype, "not run", (reason,)), None
        if self.directory is not None:
            save_outputs(self.directory, engine, outputs)
        trace = _unseen(outputs)
        note, errors = "", None
        if engine == ONNXRUNTIME:
            trace, note = self._with_scores(trace, expected, always=scores or self.dtype != "fp32")
        actual = self._split(trace)
        if trace.stages:
            self.errors = _largest([score_errors(a, b) for a, b in zip(static, actual)])
        else:
            errors = self.errors
        hop, values = self._measure((name, engine), expected, actual, errors)
        report = self._report(hop, values, note)
        if engine == ONNXRUNTIME and self.directory is not None:
            rms = hop.differences["tokens"].rms
            command = repeat_command(MODEL, name, self.directory.resolve(), self.dtype, rms)
            report = replace(report, repeat=command)
        return self._ask(report), actual

    def _outputs(self, engine: str) -> TowerOutputs:
        with open_runner(self.bundle, engine, vision=self.vision) as runner:
            def run(clips: Tensor) -> TowerTrace:
                return _unseen(TowerOutputs(*(value.cpu() for value in runner.run(clips))))

            trace = run(self.clips)
            self._keep(engine, trace, run)
            return trace.outputs

    def _keep(self, backend: str, trace: TowerTrace, run: Callable[[Tensor], TowerTrace]) -> None:
        """What the backend makes of every clip that is asked about, while it is there to run the drawn ones."""
        if self.interview is not None:
            self.seen[backend] = self.interview.look(trace, run)

    def _ask(self, report: HopReport) -> HopReport:
        if self.interview is None:
            return report
        self.progress(f"{report.actual}, answers")
        seen = self.seen
        return self.interview.compare(report, seen[STATIC], seen[report.reference], seen[report.actual], self.errors)

    def _with_scores(
        self, trace: TowerTrace, expected: Sequence[VideoTrace], *, always: bool
    ) -> tuple[TowerTrace, str]:
        """`trace` with the graph's intermediates, when they are wanted or the outputs alone do not pass."""
        if not self.bundle.manifest.traced:
            return trace, ""
        if not always:
            if judge(self._measure((STATIC, ONNXRUNTIME), expected, self._split(trace))[0]).passed:
                return trace, ""
        self.progress("onnxruntime, with intermediates")
        traced = run_traced(self.bundle, self.clips)
        a, b = trace.outputs, traced.outputs
        same = torch.equal(a.positions, b.positions) and torch.equal(a.dynamic, b.dynamic)
        if same and all(sources(x) == sources(y) for x, y in zip(a.weights, b.weights)):
            return traced._replace(outputs=trace.outputs), ""
        return trace, "with its intermediates as outputs, ONNX Runtime chooses otherwise: they are not shown"

    def _dtype_hop(self, static: Sequence[VideoTrace]) -> HopReport:
        """What the bundle's dtype does, measured in PyTorch: where no engine here shows its intermediates."""
        self.progress(f"static tower in {self.dtype}")
        lower = copy.deepcopy(self.vision).to(torch_dtype(self.dtype))
        name = f"{STATIC} in {self.dtype}"
        tower = StaticTower(lower, self.config, batch=len(self.clips)).eval()
        with torch.no_grad():
            trace = tower.trace(self.clips.to(lower.device))
        self._keep(name, _unseen(trace.outputs), lambda clips: _unseen(tower(clips)))
        actual = self._split(trace)
        self.errors = _largest([score_errors(a, b) for a, b in zip(static, actual)])
        hop, values = self._measure((STATIC, name), static, actual)
        return self._ask(self._report(hop, values, "PyTorch's arithmetic in this dtype, no engine"))

    def _split(self, trace: TowerTrace) -> tuple[VideoTrace, ...]:
        return split_trace(trace, self.config, self.shapes)

    def _measure(
        self, names: tuple[str, str], expected: Sequence[VideoTrace], actual: Sequence[VideoTrace],
        errors: ScoreErrors | None = None,
    ) -> tuple[Hop, dict[str, tuple[Tensor, Tensor]]]:
        """A hop in the bundle's dtype, and the values that its numbers are of."""
        aligned = align(expected, actual, self.config, self.shapes, errors=errors)
        return measure(aligned, names, self.dtype), aligned.values

    def _report(self, hop: Hop, values: dict[str, tuple[Tensor, Tensor]], note: str) -> HopReport:
        verdict = judge(hop)
        return HopReport(
            hop.reference, hop.actual, hop.dtype, "passed" if verdict.passed else "failed", verdict.reasons,
            verdict.bisect, replace(hop, plan=hop.plan.worst()), polygraphy_numbers(values, hop.dtype), note,
        )


def _unseen(outputs: TowerOutputs) -> TowerTrace:
    """Of a backend that does not show what it chose from."""
    return TowerTrace(outputs, (), None, None)


def _largest(errors: Sequence[ScoreErrors]) -> ScoreErrors:
    """Over the videos of a call; a layer counts when one of them reached it."""
    longest = max((len(e.similarity) for e in errors), default=0)
    layers = [[e.similarity[k] for e in errors if k < len(e.similarity)] for k in range(longest)]
    return ScoreErrors(tuple(map(max, layers)), max((e.received for e in errors), default=0.0))


def _clips(bundle: Bundle, frames: Tensor | NDArray[np.uint8]) -> Tensor:
    """uint8 [V, T, H, W, 3]; one clip serves a batch, begun later for each video so that they differ."""
    clips = torch.as_tensor(frames)
    if clips.dim() == 4:
        v, t = bundle.manifest.batch, len(clips)
        clips = torch.stack([clips.roll(-(i * t // v), 0) for i in range(v)])
    expected = bundle.manifest.inputs[0]
    if tuple(clips.shape) != expected.shape or clips.dtype != torch.uint8:
        raise InputError(
            f"the clip is {clips.dtype} {list(clips.shape)}, the bundle takes {expected.dtype} {list(expected.shape)}"
        )
    return clips.contiguous()


def _weights(bundle: Bundle, checkpoint: str | Path | None) -> Vision:
    name = checkpoint or bundle.manifest.checkpoint["name"]
    vision = load(name, parts=("vision",), pooling=bundle.manifest.config.pooling, check=bundle.check_weights).vision
    assert vision is not None
    return vision


def _vouched(bundle: Bundle) -> Bundle:
    """A bundle that is being written has a manifest without files: list those that are there."""
    if bundle.manifest.files:
        return bundle
    files = {path.name: digest_file(path) for path in sorted(bundle.path.iterdir())}
    return Bundle(bundle.path, replace(bundle.manifest, files=files))
