"""What an answer costs before and after EarlyTom, for people and as JSON: in a dry run, and in a bundle's report."""

from __future__ import annotations

from typing import Any

from earlytom.errors import ConfigError
from earlytom.flops import CallWork, ModelWork, Work, model_work, tower_cost
from earlytom.language.geometry import LanguageGeometry
from engines.bundle.manifest import Manifest
from engines.rates import RATES, Rates, find_rates, floor

from .markdown import table

UNKNOWN_LLM = "the checkpoint's configuration does not tell all sizes of the LLM, so its share is not counted"


def work_lines(work: ModelWork) -> list[str]:
    """Before -> after of each part, and of all up to the first token."""
    lines = [f"work        before -> after, with {work.text_tokens} text tokens in each prompt:"]
    for name, before, after in work.parts:
        text = f"  {name:<9} {_flops(name, before, after)}, weights {_bytes(before.weight_bytes)}"
        if before.cache_bytes:
            text += f", keys and values {_bytes(before.cache_bytes)} -> {_bytes(after.cache_bytes)}"
        if name != "decode":
            text += f", activations about {_bytes(before.activation_bytes)} -> {_bytes(after.activation_bytes)}"
        lines.append(text)
    if work.before.prefill is None:
        return [*lines, f"  {UNKNOWN_LLM}"]
    total = [sum(part.flops for part in call.to_first_token) for _, call in _calls(work)]
    return [*lines, f"  all up to the first token: {_pair(total[0], total[1], 1e12, 'TFLOP')}"]


def floor_lines(work: ModelWork, cards: str | None, dtype: str) -> list[str]:
    """The least time to the first token, and of a token after it, on each of the cards of `--for`."""
    if cards is None:
        return ["floor       --for a100,rtx4090 tells the least time that this takes on a card"]
    found, missing = find_rates(cards)
    lines = ["floor       ms at a card's best: FLOPs over its matrix rate, or bytes over its bandwidth, if more:"]
    lines += [f"  {rates.title}: {_floor_text(work, rates, dtype)}" for rates in found]
    lines += [f"  {name}: no figures; there are some for {', '.join(RATES)}" for name in missing]
    return lines


def floors(work: ModelWork, cards: str | None, dtype: str) -> list[dict[str, Any]]:
    """Plain JSON of the same: of each card seconds and bound of each part, seconds to the first token, or why not."""
    if cards is None:
        return []
    known, missing = find_rates(cards)
    found: list[dict[str, Any]] = [{"card": name, "why": "no figures"} for name in missing]
    for rates in known:
        if rates.matrix_rate(dtype) is None:
            found.append({"card": rates.title, "why": f"no matrix products in {dtype}"})
            continue
        parts = {
            name: {
                when: {"seconds": least.seconds, "bound": least.bound}
                for when, least in (("before", floor(before, rates, dtype)), ("after", floor(after, rates, dtype)))
            }
            for name, before, after in work.parts
        }
        first = {when: _first_token(call, rates, dtype) for when, call in _calls(work)}
        found.append({"card": rates.title, "source": rates.source, "parts": parts, "first_token_seconds": first})
    return found


def cost_section(manifest: Manifest) -> str:
    """The section of a bundle's report."""
    cost = tower_cost(manifest.config, manifest.geometry, batch=manifest.batch, dtype=manifest.dtype)
    before, after = cost.before, cost.after
    rows = [("tower, TFLOP", before.flops.total / 1e12, after.flops.total / 1e12, ".4g")]
    language = _language(manifest)
    if language is not None:
        work = model_work(
            manifest.config, manifest.geometry, language, batch=manifest.batch, dtype=manifest.dtype
        )
        for name, a, b in work.parts:
            if name in ("prefill", "decode"):
                unit, scale = ("TFLOP", 1e12) if name == "prefill" else ("GFLOP a token", 1e9)
                title = f"LLM {name}, with {work.text_tokens} text tokens, {unit}"
                rows.append((title, a.flops / scale, b.flops / scale, ".4g"))
    if before.prefill_flops and after.prefill_flops:
        name = "LLM prefill of the visual tokens, TFLOP (the paper's count)"
        rows.append((name, before.prefill_flops / 1e12, after.prefill_flops / 1e12, ".4g"))
    rows.append(("visual tokens", before.tokens, after.tokens, "d"))
    widest = (before.activation_bytes / 1e6, after.activation_bytes / 1e6)
    rows.append(("widest activations, MB (estimate)", *widest, ".0f"))
    lines = [(name, format(a, spec), format(b, spec), f"{b / a:.0%}") for name, a, b, spec in rows]
    stages = [
        ("–".join(str(i) for i in sorted(set(s.layers))), str(s.frames), f"{s.flops / 1e12:.4g}")
        for s in after.flops.stages
    ]
    return "\n\n".join([
        "## Cost of one call",
        f"Weights: {cost.weight_bytes / 1e6:.1f} MB. Matrix products only; a multiply-add counts as two FLOPs, in "
        "the paper's count as one.",
        table(("", "before", "after", "share"), lines),
        table(("encoder layers", "frames", "TFLOP"), stages),
    ])


def _language(manifest: Manifest) -> LanguageGeometry | None:
    """Sizes of the LLM, as the checkpoint's identity has them since it tells them; None in an earlier bundle."""
    found = manifest.checkpoint.get("language")
    try:
        return LanguageGeometry(**found) if isinstance(found, dict) else None
    except (TypeError, ConfigError):  # a later version's
        return None


def _floor_text(work: ModelWork, rates: Rates, dtype: str) -> str:
    if rates.matrix_rate(dtype) is None:
        return f"no matrix products in {dtype}"
    parts = {name: _ms(before, after, rates, dtype) for name, before, after in work.parts}
    decode = parts.pop("decode", None)
    text = f"{'first token' if decode else 'tower'} {_first_tokens(work, rates, dtype)}"
    text += f" ({', '.join(f'{name} {ms}' for name, ms in parts.items())})"
    if decode:
        text += f", then {decode} a token"
    if dtype == "fp32" and rates.tf32 is not None:
        text += f"\n    with TF32, which is off here, {_first_tokens(work, rates, 'tf32')}"
    return text


def _first_tokens(work: ModelWork, rates: Rates, kind: str) -> str:
    before, after = (_first_token(call, rates, kind) * 1000 for _, call in _calls(work))
    return f"{before:.4g} -> {after:.4g}"


def _calls(work: ModelWork) -> tuple[tuple[str, CallWork], ...]:
    return ("before", work.before), ("after", work.after)


def _first_token(call: CallWork, rates: Rates, kind: str) -> float:
    """Seconds: the parts wait for each other."""
    return sum(floor(work, rates, kind).seconds for work in call.to_first_token)


def _ms(before: Work, after: Work, rates: Rates, kind: str) -> str:
    """Milliseconds before -> after, and whether bytes are what bounds them."""
    a, b = floor(before, rates, kind), floor(after, rates, kind)
    bound = " by bytes" if a.bound == "bytes" else ""
    last = " by bytes" if b.bound == "bytes" else ""
    return f"{a.seconds * 1000:.3g}{bound if bound != last else ''} -> {b.seconds * 1000:.3g}{last}"


def _flops(part: str, before: Work, after: Work) -> str:
    """A step of decoding is a thousandth of the other parts."""
    if part == "decode":
        return _pair(before.flops, after.flops, 1e9, "GFLOP a token")
    return _pair(before.flops, after.flops, 1e12, "TFLOP")


def _pair(before: float, after: float, unit: float, name: str) -> str:
    return f"{before / unit:.4g} -> {after / unit:.4g} {name} ({after / before:.0%})"


def _bytes(count: int) -> str:
    """In MB, or GB from 1 GB on."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
