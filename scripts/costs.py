"""The tables of docs/performance.md, from counts alone, without torch: python -m scripts.costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from earlytom.config import EarlyTomConfig
from earlytom.flops import CallWork, ModelWork, Work, model_work, prefill_flops, tower_flops, unpruned_config
from earlytom.language.geometry import PUBLISHED
from earlytom.presets import preset
from earlytom.vision.geometry import VisionGeometry
from engines.rates import RATES, Rates, floor
from export.markdown import table

RETAIN, DTYPE, CARD = 0.2, "fp16", RATES["a100"]
CARDS = ("a100", "a10040gb", "h100", "h200", "l40s", "l4", "a10g", "rtx4090", "rtx3090", "t4")
MODELS = (
    ("LLaVA-OneVision-0.5B", 896, "llava-onevision"),
    ("LLaVA-OneVision-7B", 3584, "llava-onevision"),
    ("LLaVA-OneVision-72B", 8192, "llava-onevision"),
    ("LLaVA-Video-7B", 3584, "llava-video"),
)
GEOMETRY, LLM = VisionGeometry(), PUBLISHED[3584]  # of the 7B
# TFLOPs of the paper's main table, LLaVA-OneVision-7B: method, figure, visual tokens (None: all), inner merging.
PAPER = (
    ("all tokens", 82.6, None, False), ("VisionZip, 10 %", 45.2, 0.1, False), ("HoliTom, 10 %", 44.6, 0.1, True),
)
PAPER_EARLYTOM = ((0.1, 32.2), (0.25, 36.5))


@dataclass(frozen=True)
class Section:
    """A table and the sentence above it."""

    title: str
    table: str


def sections() -> tuple[Section, ...]:
    return (
        Section("By part, TFLOP before → after (share left); decode: GFLOP for a token.", by_part()),
        Section("Frames, LLaVA-OneVision-7B at retain ratio 0.2, TFLOP before → after.", by_frames()),
        Section("Retain ratio, LLaVA-OneVision-7B with 32 frames, TFLOP after.", by_ratio()),
        Section(f"Videos a call, the same at 0.2: least ms on an {CARD.title}, {DTYPE}, before → after.", by_batch()),
        Section("Cards, LLaVA-OneVision-7B, 32 frames, 0.2, fp16: least ms before → after.", by_card()),
        Section("The figures of the table of cards, dense: TFLOP/s and GB/s.", card_figures()),
        Section("The paper's count, TFLOP.", paper()),
        Section("Ways to count LLaVA-OneVision-7B with 32 frames at 0.1, TFLOP.", ways()),
    )


def by_part() -> str:
    rows = []
    for name, width, model in MODELS:
        for retain in (0.1, 0.2):
            work = model_work(
                preset(retain=retain, model=model), VisionGeometry(projector_size=width), PUBLISHED[width], dtype=DTYPE
            )
            parts = {part: (before.flops, after.flops) for part, before, after in work.parts}
            first = tuple(sum(w.flops for w in call.to_first_token) for call in (work.before, work.after))
            rows.append((
                name, f"{retain:g}", *(_pair(parts[part], 1e12) for part in ("vision", "projector", "prefill")),
                _pair(first, 1e12), _pair(parts["decode"], 1e9),
            ))
    return table(("model", "retain", "vision", "projector", "prefill", "first token", "decode"), rows)


def by_frames() -> str:
    rows = []
    for frames in (8, 16, 32, 64, 128):
        work = _work(preset(retain=RETAIN, frames=frames))
        first = tuple(sum(w.flops for w in call.to_first_token) for call in (work.before, work.after))
        cells = (
            _pair((before.flops, after.flops), 1e12) for name, before, after in work.parts
            if name in ("vision", "prefill")
        )
        masked = _known(work.before.prefill).masked_flops / _known(work.before.prefill).flops
        rows.append((str(frames), *cells, _pair(first, 1e12), f"{masked:.0%}"))
    return table(("frames", "vision", "prefill", "first token", "of the full prefill behind the mask"), rows)


def by_ratio() -> str:
    rows = []
    for retain in (0.05, 0.1, 0.15, 0.2, 0.25, 0.5):
        config = preset(retain=retain, merge_layers=(8, 21, 23))  # one choice of layers, so that the ratio alone varies
        work = _work(config)
        after = dict(work.after.parts)
        first = [sum(w.flops for w in call.to_first_token) for call in (work.before, work.after)]
        budgets = ", ".join(map(str, config.frame_budgets))
        rows.append((
            f"{retain:g}", budgets, *(f"{after[name].flops / 1e12:.4g}" for name in ("vision", "projector", "prefill")),
            f"{first[1] / 1e12:.4g}", f"{1 - first[1] / first[0]:.0%}", f"{after['decode'].cache_bytes / 1e6:.4g}",
        ))
    head = ("retain", "frames left", "vision", "projector", "prefill", "first token", "fewer", "cache, MB")
    return table(head, rows)


def by_batch() -> str:
    rows = []
    for batch in (1, 2, 4, 8, 16):
        work = _work(preset(retain=RETAIN), batch=batch)
        rows.append((str(batch), *_floors(work, CARD)))
    return table(("videos", "vision", "prefill", "first token", "decode, a step"), rows)


def by_card() -> str:
    work = _work(preset(retain=RETAIN))
    rows = [(RATES[name].title, *_floors(work, RATES[name])) for name in CARDS]
    return table(("card", "vision", "prefill", "first token", "decode, a token"), rows)


def card_figures() -> str:
    rows = [
        (
            "`" + "`, `".join(name for name in RATES if RATES[name] is rates) + "`", rates.title, f"{rates.fp32:g}",
            "" if rates.tf32 is None else f"{rates.tf32:g}", f"{rates.half:g}", f"{rates.half:g}" if rates.bf16 else "",
            f"{rates.bandwidth:g}", rates.source,
        )
        for rates in dict.fromkeys(RATES.values())
    ]
    return table(("`--for`", "card", "fp32", "tf32", "fp16", "bf16", "GB/s", "source"), rows)


def formula(tokens: int, config: EarlyTomConfig | None = None) -> float:
    """The paper's formula for the 7B's LLM, TFLOP."""
    return prefill_flops(tokens, LLM.hidden_size, LLM.intermediate_size, LLM.layers, config=config) / 1e12


def vision_formula(frames: int, layers: int, *, together: bool) -> float:
    """The same formula for so400m's layers, TFLOP: the frames' patches as one sequence, or each frame by itself."""
    width, mlp, patches = GEOMETRY.hidden_size, GEOMETRY.intermediate_size, GEOMETRY.patches
    if together:
        return prefill_flops(frames * patches, width, mlp, layers) / 1e12
    return frames * prefill_flops(patches, width, mlp, layers) / 1e12


def paper() -> str:
    """The published totals beside the formula's: 26 vision layers with all patches as one sequence, and the LLM."""
    config = preset(retain=0.1)
    vision, all_tokens = vision_formula(32, GEOMETRY.layers, together=True), 32 * 196
    rows = []
    for name, said, share, merged in PAPER:
        tokens = all_tokens if share is None else round(share * all_tokens)
        llm = formula(tokens, config if merged else None)
        rows.append((name, str(tokens), f"{vision:.2f}", f"{llm:.2f}", f"{vision + llm:.2f}", f"{said}"))
    for share, said in PAPER_EARLYTOM:
        tokens = round(share * all_tokens)
        llm = formula(tokens, config)
        rows.append((
            f"EarlyTom, {share:.0%}".replace("%", " %"), str(tokens), f"{said - llm:.2f} (what is left)", f"{llm:.2f}",
            "", f"{said}",
        ))
    return table(("", "visual tokens", "vision", "LLM", "sum", "paper"), rows)


def ways() -> str:
    """What "fewer FLOPs" comes to, by what is counted."""
    config = preset(retain=0.1)
    stages = tower_flops(config, GEOMETRY).stages
    merged = {
        together: sum(vision_formula(s.frames, s.layers[1] - s.layers[0] + 1, together=together) for s in stages)
        for together in (True, False)
    }
    work = _work(config)
    towers = [tower_flops(each, GEOMETRY).total / 1e12 for each in (unpruned_config(config), config)]
    llms = [formula(6272), formula(640, config)]
    exact = [sum(w.flops for w in call.to_first_token) / 1e12 for call in (work.before, work.after)]
    least = [sum(w.least_flops for w in call.to_first_token) / 1e12 for call in (work.before, work.after)]
    found: list[tuple[str, Sequence[float]]] = [
        ("the paper's table", (82.6, 32.2)),
        ("its formula: LLM alone", llms),
        ("its formula: all patches as one sequence, our budgets; and LLM", [
            a + b for a, b in zip((vision_formula(32, 26, together=True), merged[True]), llms)
        ]),
        ("its formula: frame by frame, as SigLIP attends, our budgets; and LLM", [
            a + b for a, b in zip((vision_formula(32, 26, together=False), merged[False]), llms)
        ]),
        ("its formula: frame by frame, nothing merged; and LLM", [
            vision_formula(32, 26, together=False) + llm for llm in llms
        ]),
        ("tower exactly, twice its formula for the LLM", [a + 2 * b for a, b in zip(towers, llms)]),
        ("exactly, as FlopCounterMode counts", exact),
        ("exactly, without what the causal mask hides", least),
    ]
    rows = [(name, f"{a:.1f}", f"{b:.1f}", f"{1 - b / a:.1%}") for name, (a, b) in found]
    return table(("what is counted", "before", "after", "fewer"), rows)


def _work(config: EarlyTomConfig, **options: Any) -> ModelWork:
    return model_work(config, GEOMETRY, LLM, dtype=DTYPE, **options)


def _known(work: Work | None) -> Work:
    assert work is not None  # the LLM is given
    return work


def _pair(values: Iterable[float], unit: float) -> str:
    before, after = values
    return f"{before / unit:.4g} → {after / unit:.4g} ({after / before:.0%})"


def _floors(work: ModelWork, rates: Rates) -> tuple[str, str, str, str]:
    """Least ms of vision, prefill, all to the first token, and of a step of decoding."""
    def ms(*parts: Work) -> float:
        return 1000 * sum(floor(part, rates, DTYPE).seconds for part in parts)

    def row(call: CallWork) -> tuple[float, ...]:
        return ms(call.vision), ms(_known(call.prefill)), ms(*call.to_first_token), ms(_known(call.decode))

    vision, prefill, first, decode = (f"{a:.4g} → {b:.4g}" for a, b in zip(row(work.before), row(work.after)))
    return vision, prefill, first, decode


if __name__ == "__main__":
    print("\n\n".join(f"{section.title}\n\n{section.table}" for section in sections()))
