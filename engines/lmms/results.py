"""lmms-eval's result files: which model was run, and its scores on the four benchmarks of the paper. No torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from earlytom.errors import ConfigError, InputError

from .arguments import ModelArguments, parse_arguments

SUFFIX = "_results.json"  # what lmms-eval ends their names with


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's: its task of lmms-eval, or where `parts` > 1 the prefix of its tasks, which count alike; the
    metric, and what makes a percentage of it."""

    title: str
    task: str
    metric: str
    scale: float = 1.0
    parts: int = 1


BENCHMARKS = (
    Benchmark("MVBench", "mvbench_", "mvbench_accuracy", parts=20),
    Benchmark("EgoSchema", "egoschema_subset", "score", scale=100.0),  # answers are public of these 500 questions only
    Benchmark("LongVideoBench", "longvideobench_val_v", "lvb_acc", scale=100.0),
    Benchmark("VideoMME", "videomme", "videomme_perception_score"),
)


@dataclass(frozen=True)
class Score:
    """value: percent; file: where it was read; note: what keeps it from being the benchmark's, "" for nothing."""

    value: float
    file: Path
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A model, by name; checkpoint: its weights, "" where the file does not say; unpruned: whether it is what others
    are measured by; visual_tokens: what reached the language model, the mean of each file that tells it; scores: title
    of the benchmark -> Score.
    """

    name: str
    checkpoint: str
    unpruned: bool
    visual_tokens: tuple[float, ...]
    scores: Mapping[str, Score]


def read_results(paths: Sequence[Path]) -> tuple[Row, ...]:
    """The rows of result files, or of all result files below a directory: of the unpruned model first, then by name,
    the higher ratio first. Files of the same model make one row. Raises InputError.
    """
    rows: dict[tuple[str, str], Row] = {}
    for path in _files(paths):
        found = _row(_load(path), path)
        key = (found.checkpoint, found.name)
        rows[key] = found if key not in rows else _together(rows[key], found)
    return tuple(sorted(rows.values(), key=lambda row: (row.checkpoint, not row.unpruned, _order(row.name))))


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"no result of lmms-eval lies in the directory {path}: their names end in {SUFFIX}")
        found += [file for file in inside if file not in found]
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise InputError(f"the results {path} cannot be read: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in ("results", "config")):
        raise InputError(f"{path} is no result file of lmms-eval: it has no results and config")
    return content


def _row(content: dict[str, Any], path: Path) -> Row:
    config = content["config"]
    model, given = str(config.get("model")), config.get("model_args") or ""
    told = content.get("throughput", {}).get("avg_visual_tokens")
    tokens = () if told is None else (float(told),)
    scores = {b.title: score for b in BENCHMARKS if (score := _score(b, content, path)) is not None}
    if not scores:
        tasks = ", ".join(content["results"]) or "none"
        raise InputError(
            f"{path} holds no benchmark of the table: its tasks are {tasks}, the table's "
            f"{', '.join(b.task + '*' * (b.parts > 1) for b in BENCHMARKS)}"
        )
    if model != "earlytom":
        return Row(model, "", False, tokens, scores)
    text = ",".join(f"{name}={value}" for name, value in given.items()) if isinstance(given, dict) else str(given)
    try:
        arguments = parse_arguments(text)
    except ConfigError as error:
        raise InputError(f"{path} has model_args {text!r}: {error}") from None
    return Row(row_name(arguments), arguments.checkpoint or "", arguments.unpruned, tokens, scores)


def row_name(arguments: ModelArguments) -> str:
    """What tells a model from others in the table; the preset does not, which differs by benchmark."""
    if arguments.unpruned:
        return "unpruned" + (f", {arguments.frames} frames" if arguments.frames else "")
    parts = [f"bundle {Path(arguments.bundle).name}" if arguments.bundle else f"retain {arguments.retain:g}"]
    if arguments.bundle is None and arguments.frame_budgets == "fixed":
        parts.append("fixed budgets")
    if arguments.bundle is not None and arguments.frame_budgets == "data":
        parts.append("budgets by data")
    parts += [f"{arguments.frames} frames"] if arguments.frames else []
    inner = {"on": [], "off": ["no inner merging"], "as-released": ["inner as released"]}
    return ", ".join(parts + inner[arguments.inner])


def _score(benchmark: Benchmark, content: dict[str, Any], path: Path) -> Score | None:
    """A benchmark's score, None when it was not run. Raises InputError for one without a number."""
    results = content["results"]
    wanted = [name for name in results if name == benchmark.task]
    if benchmark.parts > 1:
        wanted = [name for name in results if name.startswith(benchmark.task)]
    if not wanted:
        return None
    values, notes = [], []
    for task in wanted:
        metric = next((name for name in results[task] if name.split(",")[0] == benchmark.metric), None)
        value = results[task].get(metric)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{path} has no {benchmark.metric} of {task}")
        values.append(float(value))
        counts = content.get("n-samples", {}).get(task, {})
        if counts.get("effective") != counts.get("original"):
            notes.append(f"{counts['effective']:g} of {counts['original']} questions of {task}")
    if len(wanted) < benchmark.parts:
        notes.append(f"{len(wanted)} of its {benchmark.parts} tasks")
    return Score(benchmark.scale * statistics.fmean(values), path, ", ".join(notes))


def _together(one: Row, other: Row) -> Row:
    if twice := sorted(set(one.scores) & set(other.scores)):
        files = " and ".join(str(row.scores[twice[0]].file) for row in (one, other))
        raise InputError(f"{twice[0]} of {one.name} is in two files, {files}: give one of them")
    tokens = one.visual_tokens + other.visual_tokens
    return replace(one, scores={**one.scores, **other.scores}, visual_tokens=tokens)


def _order(name: str) -> tuple[str, float, str]:
    """Ratios from high to low, other names as they are."""
    kind, _, rest = name.partition(" ")
    number = rest.split(",")[0]
    return (kind, -float(number), rest) if kind == "retain" else (kind, 0.0, rest)
