"""report.md: what was exported, what it costs, whether it can be trusted, in Markdown for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from earlytom.flops import unpruned_config
from earlytom.parity import TOLERANCES, HopReport
from earlytom.parity.results import STATES, PlanAgreement
from earlytom.shapes import derive_shapes
from engines.bundle.manifest import MODEL, Manifest

from .costs import cost_section
from .markdown import table

if TYPE_CHECKING:
    from .onnx.check import GraphSummary

MEANING = """\
Each hop compares two implementations on one clip. **Plans** first: which frames were merged into which, and which
patches of each frame stay. **Numbers** then, where the plans agree: a token that only one side kept has no counterpart.

- *max*, *mean*: absolute error of one number; *relative*: norm of the error over norm of the values (1e-3 is usual in
  fp16, 1e-6 in fp32); *cosine*: of all values as one vector; *worst cosine*: of the worst single token; *SQNR*: signal
  over error in decibels, 20 dB for each factor of 10.
- A **flip** is a choice that two implementations made differently. Its *margin* is how far the deciding score was from
  the alternative, its *error* how far that score differs between the two. A margin within the error is a near-tie:
  both answers are right. A margin above it is a fault, and fails the hop. In fp32 only ties that float32 cannot
  resolve may flip, such as copies of one frame.
- Only the first merge layer that differs is taken apart: behind it the two implementations see different frames.
- **Answers**: of the bundle's language model in PyTorch and float32, greedy, to both sides' visual tokens. Where two
  differ, the *margin* is the logit of the reference's token over that of the other's at the first token that differs,
  the *error* the largest difference of a logit there. A margin of at most twice the error, and twice what the dtype
  may err, is a near-tie; any other answer that differs fails the hop. Where the two plans of a clip part at a tie, the
  answers are about *other frames*. Drawn clips hold the tolerances of their hop as the verified one does.
- NaN and infinite values fail a hop. What could not run here says *not run*; that is no pass."""


def render_report(manifest: Manifest, summary: GraphSummary | None = None) -> str:
    """Markdown for `report.md`; summary: of the graph, where it was checked."""
    sections = [
        _head(manifest), _shapes(manifest), cost_section(manifest), _graph(manifest, summary), _engines(manifest),
        _parity(manifest),
    ]
    return "\n\n".join(text for text in sections if text) + "\n"


def _head(manifest: Manifest) -> str:
    config, checkpoint = manifest.config, manifest.checkpoint
    inner = config.inner
    rows = [
        ("checkpoint", f"{checkpoint['name']} ({checkpoint['format']}, weights `{checkpoint['digest'][:12]}`)"),
        ("graph", f"`{MODEL}`, {manifest.dtype}, opset {manifest.opset}, attention as {manifest.attention}"),
        ("videos a call", str(manifest.batch)),
        ("retain ratio", f"{config.retain:g}"),
        ("merging", f"after layers {_join(config.merge_layers)}; tau {config.tau:g}, M {config.max_window}, "
                    f"ema {config.ema:g}" if config.merge_layers else "none"),
        ("inner merging", f"layer {inner.layer}, ratio {inner.ratio:g}, {inner.method}" if inner else "none"),
        ("parity", _overall(manifest.parity)),
    ]
    engines = [
        f"`{e.file}`: {e.product} {e.version} for {_join(e.targets)}" + (f", built on {e.gpu}" if e.gpu else "")
        for e in manifest.engines
    ]
    rows.append(("engines", "; ".join(engines) or f"none but the graph, which ONNX Runtime runs ({MODEL})"))
    tools = ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items()))
    return f"# EarlyTom bundle\n\n{table(('', ''), rows)}" + (f"\n\nMade with {tools}." if tools else "")


def _overall(hops: Sequence[HopReport]) -> str:
    if not hops:
        return "not verified"
    count = {status: sum(hop.status == status for hop in hops) for status in STATES}
    said = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    return f"**FAILED** ({said})" if count["failed"] else f"{said} of {len(hops)} hops"


def _shapes(manifest: Manifest) -> str:
    shapes, counts = manifest.shapes, manifest.counts
    before = derive_shapes(unpruned_config(manifest.config), manifest.geometry, manifest.batch)
    stages = [("input", shapes.frames)]
    stages += [(f"after layer {layer}", b) for layer, b in zip(manifest.config.merge_layers, shapes.stage_frames[1:])]
    rows = [(name, str(b), f"[{b}, {shapes.patches}, {shapes.hidden_size}]") for name, b in stages]
    rows.append(("pooled", str(shapes.final_frames), f"[{shapes.final_frames}, {shapes.pooled_patches}]"))
    rows.append((
        "selected", str(shapes.final_frames), f"[{shapes.final_frames}, {shapes.keep}, {shapes.projector_size}]"
    ))
    newlines = f" + {_count(counts.newlines, 'newline')}" if counts.newlines else ""
    text = (
        f"A video becomes **{counts.tokens} tokens** ({counts.frames_left} frames x {counts.patches_kept} "
        f"patches{newlines}); unpruned it would be {before.tokens}."
    )
    tensors = [(kind, f"`{t.name}`", t.dtype, str(list(t.shape))) for kind, specs in
               (("input", manifest.inputs), ("output", manifest.outputs)) for t in specs]
    return "\n\n".join([
        "## Shapes", text, table(("stage of one video", "frames", "shape"), rows),
        table(("", "tensor", "dtype", "shape"), tensors),
    ])


def _graph(manifest: Manifest, summary: GraphSummary | None) -> str:
    if summary is None:
        return ""
    kinds: dict[str, int] = {}
    for kind in summary.attention.values():
        kinds[kind] = kinds.get(kind, 0) + 1
    attention = ", ".join(f"{number} as {kind}" for kind, number in sorted(kinds.items()))
    operators = ", ".join(f"{name} {number}" for name, number in sorted(summary.operators.items()))
    lines = [f"{summary.nodes} nodes; attention: {attention or 'none found'}.", f"Operators: {operators}."]
    if summary.float32_products and manifest.dtype != "fp32":
        lines.append(f"Matrix products kept in float32: {len(summary.float32_products)} (similarity and plans).")
    return "## Graph\n\n" + "\n\n".join(lines)


def _engines(manifest: Manifest) -> str:
    """What the engines are made of, as far as it could be seen where they were built."""
    lines = []
    for engine in manifest.engines:
        found = engine.settings.inspected
        if found is None:
            continue
        seen = f"{found.fused} of {found.attention} attentions fused"
        lines.append(f"- `{engine.file}`: " + "; ".join(found.warnings or [seen]))
    return "## Engines\n\n" + "\n".join(lines) if lines else ""


def _parity(manifest: Manifest) -> str:
    hops = manifest.parity
    if not hops:
        return "## Parity\n\nNot verified. `earlytom-verify` on this directory does it."
    rows = [(hop.name, hop.dtype, f"**{hop.status}**", *_summary(hop)) for hop in hops]
    head = ["hop", "dtype", "", "frames equal", "patches equal", "flips (near-ties)", "tokens: max", "cosine", "SQNR"]
    if any(hop.answers or hop.unasked for hop in hops):
        head, rows = [*head, "answers equal"], [(*row, _answered(hop)) for row, hop in zip(rows, hops)]
    parts = ["## Parity", table(head, rows), _tolerance(manifest.dtype), MEANING]
    return "\n\n".join(parts + [_hop(hop) for hop in hops] + [_repeat(hops)])


def _summary(hop: HopReport) -> tuple[str, ...]:
    if hop.numbers is None:
        return ("",) * 6
    plan, tokens = hop.numbers.plan, hop.numbers.differences["tokens"]
    return (
        f"{plan.frames_equal} of {plan.frames}", f"{plan.patches_equal} of {plan.patches}",
        f"{plan.flips_total} ({plan.flips_excused})", _number(tokens.max_abs), f"{tokens.cosine:.6f}",
        "exact" if tokens.sqnr_db == math.inf else f"{tokens.sqnr_db:.0f} dB",
    )


def _tolerance(dtype: str) -> str:
    limit = TOLERANCES[dtype]
    tokens = f"largest error {limit.tokens:g} (times the tokens' rms where that is above 1), " if limit.tokens else ""
    choices = "every choice equal but exact ties" if limit.exact else "every flip a near-tie"
    return (
        f"Asked of {dtype}: tokens {tokens}cosine at least {limit.cosine:g}, of each token {limit.worst_cosine:g}; "
        f"{choices}; at least {limit.patches:.0%} of the patches equal in frames whose plan agrees; errors of at most "
        f"{limit.similarity:g} in similarities, {limit.weights:g} in merge weights, {limit.received:g} (relative) in "
        "attention received."
    )


def _hop(hop: HopReport) -> str:
    lines = [f"### {hop.name}: {hop.status}"]
    lines += [f"- {reason}" for reason in hop.reasons]
    if hop.bisect:
        lines.append(f"- where it first goes wrong: {hop.bisect}")
    if hop.note:
        lines.append(f"\nNote: {hop.note}.")
    lines += _answers(hop)
    if hop.numbers is None:
        return "\n".join(lines)
    rows = [
        (
            name, f"{d.count}", _number(d.max_abs), _number(d.mean_abs), _number(d.relative), f"{d.cosine:.6f}",
            f"{d.worst_cosine:.6f}", "" if math.isinf(d.sqnr_db) else f"{d.sqnr_db:.1f}", f"{d.nans}/{d.infs}",
        )
        for name, d in hop.numbers.differences.items()
    ]
    head = ("", "values", "max", "mean", "relative", "cosine", "worst cosine", "SQNR dB", "NaN/Inf")
    lines += ["", table(head, rows)]
    plan, shares = hop.numbers.plan, hop.numbers.plan.shares
    first = "no merge layer's plan differs" if plan.first_layer is None else (
        f"the first plan that differs is that of merge layer {plan.first_layer}"
    )
    lines.append(
        f"\nPlans: {shares.frames:.2%} of the frames are the same mix, {shares.dynamic:.2%} of those have the "
        f"same mark (static or dynamic), {shares.patches:.2%} of all patches are equal, "
        f"{shares.comparable_patches:.2%} in frames with the same mix and mark; {first}."
    )
    if plan.flips:
        lines += ["", _flips(plan)]
    if "tokens" in hop.polygraphy:
        t = hop.polygraphy["tokens"]
        lines.append(
            f"\nPolygraphy's comparator on the same tokens: max {_number(t['max_absdiff'])}, mean "
            f"{_number(t['mean_absdiff'])}, median {_number(t['median_absdiff'])}, "
            f"cosine {_number(t['cosine_similarity'], '.6f')}, "
            + (f"SNR {t['snr']:.1f} dB." if t["snr"] is not None else "no difference.")
        )
    return "\n".join(lines)


def _answered(hop: HopReport) -> str:
    if hop.answers is None:
        return "not run" if hop.unasked else ""
    ties = f" ({_count(hop.answers.explained, 'near-tie')})" if hop.answers.explained else ""
    return f"{hop.answers.equal} of {hop.answers.questions}{ties}"


def _answers(hop: HopReport) -> list[str]:
    """What the language model said to the two sides' tokens; nothing where it was not to be asked."""
    found = hop.answers
    if found is None:
        return [f"\nAnswers: not run. {hop.unasked}."] if hop.unasked else []
    text = (
        f"\nAnswers: {found.equal} of {found.questions} are equal, {found.common} of {found.tokens} tokens until they "
        f"part; largest difference of a logit {_number(found.error)}, closest choice {_number(found.closest)}."
    )
    rows = [
        (
            d.question, str(d.clip), str(d.index), f"{d.common}**{d.reference}**", f"{d.common}**{d.actual}**",
            _number(d.margin), _number(d.error), _number(d.allowed),
            "**fault**" if not d.explained else "other frames" if d.parting else "near-tie",
        )
        for d in found.divergences
    ]
    head = ("question", "clip", "token", hop.reference, hop.actual, "margin", "error", "allowed", "")
    partings = sorted({(d.clip, d.parting) for d in found.divergences if d.parting})
    ties = [f"\nThe plans of clip {clip} part at a tie: {parting}." for clip, parting in partings]
    return [text, *(["", table(head, rows), *ties] if rows else [])]


def _flips(plan: PlanAgreement) -> str:
    rows = [
        (
            f.kind, "end" if f.layer is None else str(f.layer), str(f.frame), f.what,
            "unknown" if f.margin is None else _number(f.margin), _number(f.error),
            "tie" if f.tied else ("near-tie" if f.excused else "**fault**"),
        )
        for f in plan.flips
    ]
    more = plan.flips_total - len(rows)
    head = ("choice", "layer", "frame", "what", "margin", "error", "")
    return table(head, rows) + (f"\n\n{more} more flips with larger room are left out." if more else "")


def _repeat(hops: Sequence[HopReport]) -> str:
    commands = [hop.repeat for hop in hops if hop.repeat]
    text = (
        "## Repeating it\n\n`earlytom-verify BUNDLE [--video FILE]` runs all hops again; its exit status is 1 when one "
        "fails. With `--save-tensors DIR` it writes inputs and outputs in Polygraphy's format, and Polygraphy repeats "
        "a hop by itself, in the bundle's directory (it compares whole outputs, so flips count as errors there):"
    )
    commands = commands or [
        f"polygraphy run {MODEL} --onnxrt --load-inputs DIR/inputs.json --load-outputs DIR/outputs.static.json"
    ]
    return text + "\n\n```\n" + "\n".join(commands) + "\n```"


def _number(value: float | None, form: str = ".2e") -> str:
    return "not finite" if value is None or math.isinf(value) else (format(value, form) if value else "0")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _join(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
