"""Results as Markdown: ratios first, then where the time goes. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from earlytom.demo.table import aligned_table

from .results import GENERATION, VISION, Results, Row, speedup
from .spread import Timing

CARD = "Times are between CUDA events in the stream; nothing waits between spans, but between vision and LLM."
CPU = "Times are read from the clock."


def markdown(results: Results) -> str:
    """What was measured and on what, ratios, times by part, vision by stage, who did not take part, how it was done."""
    alone, base = results.settings.vision_only, results.base
    parts = [heading(results)]
    if alone:
        parts.append(f"How many times as fast as {base.name}, the tower alone\n\n" + _vision_ratios(results, base))
    else:
        parts.append(f"How many times as fast as {base.name}\n\n" + _ratios(results, base))
        parts += [_again(results, row) for row in results.rows if row.second_question]
    parts.append("Milliseconds\n\n" + _times(results))
    stages = _stages(results)
    if stages:
        parts.append("Vision by stage, ms\n\n" + stages)
    if results.not_run:
        parts.append("\n".join(f"* {entry.name}: not run: {entry.why}" for entry in results.not_run) + "\n")
    what = {row.name if row.second_question else row.contestant: row.what for row in results.rows}
    parts.append("\n".join(f"* {name}: {text}" for name, text in what.items()) + "\n")
    parts.append(_how(results) + "\n")
    return "\n".join(parts)


def heading(results: Results) -> str:
    """Model, machine and versions, a line each."""
    machine = results.machine
    where = machine.get("card") if results.device != "cpu" else None
    where = where or f"{machine.get('processor', 'an unknown processor')}, {machine.get('threads', '?')} threads"
    versions = machine.get("versions", {})
    packages = ("torch", "transformers", "onnxruntime", "tensorrt", "tensorrt-rtx")
    used = ", ".join(f"{name} {versions[name]}" for name in packages if name in versions)
    kinds = ", ".join(dict.fromkeys(filter(None, (results.dtype, results.language_dtype))))
    lines = [
        results.model, f"{where}; {kinds}" + (f"; language model: {results.attention}" if results.attention else ""),
        f"earlytom-export {results.version}" + (f" ({results.commit})" if results.commit else "") + f", {used}",
    ]
    return "  \n".join(lines) + "\n"


def milliseconds(timing: Timing | None) -> str:
    if timing is None:
        return "—"
    digits = 0 if timing.median >= 100 else 1 if timing.median >= 10 else 2
    return f"{timing.median:.{digits}f} [{timing.minimum:.{digits}f}–{timing.maximum:.{digits}f}]"


def size(count: int | None) -> str:
    return "—" if count is None else f"{count / 2**20:.0f} MiB"


def times_as_fast(base: Row, row: Row, name: str) -> str:
    found = speedup(base, row, name)
    return "—" if found is None else f"{found:.2f}x"


def _again(results: Results, row: Row) -> str:
    """A second question against the first."""
    first = results.row(row.contestant)
    found = speedup(first, row, "prefill") if first is not None else None
    if first is None or found is None:
        return ""
    return f"The second question's prefill is {found:.2f}x as fast as the first's ({first.name}).\n"


def _how(results: Results) -> str:
    settings = results.settings
    sentences = [
        "One process; every round runs each contestant once, in an order that alternates.",
        f"Median of {results.base.ttft.runs} [least–most], after {settings.warm_up} rounds that do not count; ratios "
        "are medians over rounds.",
        CPU if results.device == "cpu" else CARD,
    ]
    if settings.full_size:
        sentences.append("Weights are random: only of released and adaptive does the work, the frames left, follow "
                         "from them.")
    if not settings.vision_only:
        sentences += [
            f"Every answer is {settings.new_tokens} tokens long.",
            "A row with inner merging shares the vision of the row without.",
        ]
    return " ".join([*sentences, "Memory is what a run needs on top of the weights and whatever else is held."])


def _ratios(results: Results, base: Row) -> str:
    heads = ["", "TTFT", VISION, "prefill", "tokens/s", "vision FLOPs", "prefill FLOPs", "visual tokens", "frames left"]
    rows = []
    for row in results.rows:
        rate, whole = row.tokens_per_second, base.tokens_per_second
        rows.append([
            row.name, times_as_fast(base, row, "ttft"), times_as_fast(base, row, VISION),
            times_as_fast(base, row, "prefill"),
            f"{rate.median / whole.median:.2f}x" if rate and whole else "—",
            _share(row.vision_flops, base.vision_flops), _share(row.prefill_flops, base.prefill_flops),
            str(row.visual_tokens), ",".join(map(str, row.frames)) or "—",
        ])
    return aligned_table(heads, rows)


def _vision_ratios(results: Results, base: Row) -> str:
    rows = [
        [row.name, times_as_fast(base, row, VISION), _share(row.vision_flops, base.vision_flops), _rate(row)]
        for row in results.rows
    ]
    return aligned_table(["", VISION, "FLOPs", "TFLOP/s"], rows)


def _times(results: Results) -> str:
    names = [span.name for row in results.rows for span in row.spans if not span.name.startswith(VISION)]
    present = [name for name in ("decode", "resize", "copy", VISION, "splice", "prefill", "first token")
               if name == VISION or name in names]
    alone = results.settings.vision_only
    heads = ["", *([] if alone else ["TTFT"]), *present, *([] if alone else ["tokens/s"]), "memory", "engine"]
    rows = []
    for row in results.rows:
        cells = [milliseconds(Timing.of(found) if (found := row.milliseconds(name)) else None) for name in present]
        rate = row.tokens_per_second
        rows.append([
            row.name, *([] if alone else [milliseconds(row.ttft)]), *cells,
            *([] if alone else ["—" if rate is None else f"{rate.median:.1f}"]),
            size(row.memory_bytes), size(row.engine_bytes),
        ])
    return aligned_table(heads, rows)


def _stages(results: Results) -> str:
    """Of the rows that can be looked into, inner merging left out: it shares its vision."""
    rows = [row for row in results.rows if not row.inner and len(vision_stages(row)) > 1]
    if not rows:
        return ""
    widest = max(rows, key=lambda row: len(vision_stages(row)))
    names = list(vision_stages(widest))
    names += [name for row in rows for name in vision_stages(row) if name not in names]
    cells = [
        [row.name, *(milliseconds(vision_stages(row).get(name)) for name in dict.fromkeys(names))] for row in rows
    ]
    return aligned_table(["", *(name.removeprefix("vision: ") for name in dict.fromkeys(names))], cells)


def vision_stages(row: Row) -> dict[str, Timing]:
    return {span.name: span.timing for span in row.spans if span.name.startswith(VISION)}


def to_first_token(row: Row) -> Sequence[tuple[str, float]]:
    """Spans up to the first token with their medians."""
    return [(span.name, span.timing.median) for span in row.spans if span.name != GENERATION]


def _share(part: int | None, whole: int | None) -> str:
    return "—" if part is None or not whole else f"{100 * part / whole:.1f} %"


def _rate(row: Row) -> str:
    took = row.milliseconds(VISION)
    return "—" if row.vision_flops is None or not took else f"{row.vision_flops / Timing.of(took).median / 1e9:.2f}"
