"""A calibration for people: a histogram for each merge layer, and a table of the choices."""

from __future__ import annotations

import math
from collections.abc import Mapping

from earlytom.calibration.agreement import Agreement
from earlytom.calibration.result import Calibration, Choice
from earlytom.demo.table import aligned_table

from ..settings import merging_text

LINES = 16  # of a histogram, at most
WIDTH = 40  # of its longest bar

LEGEND = """\
plans equal: clips on which the budgets give the released plan at every merge layer; same frames: clips that end with
the same frames, by whatever steps. Mean over the clips whose plans are not equal: differing (and most), frames left
with a mix of source frames that the released rules do not leave; missing, the other way round."""


def describe(found: Calibration) -> str:
    config = found.config
    clips = f"{len(found.clips)} clip{'s' * (len(found.clips) != 1)} of {config.frames} frames"
    parts = [
        f"{clips}, {found.checkpoint} ({found.geometry.layers} layers), retain {config.retain:g}, "
        f"{merging_text(config)}"
    ]
    for stage, layer in enumerate(config.merge_layers):
        marks: dict[int, list[str]] = {}
        for choice in found.choices:
            if choice.budgets is not None:
                marks.setdefault(choice.budgets[stage], []).append(choice.name)
        spread = found.percentiles(stage)
        parts.append(
            f"\nframes that the released rules leave after layer {layer}; percentiles {'/'.join(map(str, spread))}: "
            f"{'/'.join(f'{value:g}' for value in spread.values())}\n"
            + histogram_text(found.histogram(stage), {at: " and ".join(names) for at, names in marks.items()})
        )
    rows = [["unpruned", str(config.frames), f"{found.full / 1e12:.4g}", "100 %", *[""] * 4]]
    rows += [_row(choice, found.full) for choice in found.choices]
    heads = ["tower", "frames left", "TFLOP", "of unpruned", "plans equal", "same frames", "differing", "missing"]
    parts += ["", aligned_table(heads, rows), LEGEND, "", _proposed(found)]
    for skipped in found.skipped:
        parts.append(f"skipped: {skipped.reason}")
    return "\n".join(parts)


def histogram_text(clips: Mapping[int, int], marks: Mapping[int, str]) -> str:
    """Lines of bars: clips by frames left, neighbours put together where there are too many; marks: at some counts."""
    low, high = min((*clips, *marks)), max((*clips, *marks))
    step = math.ceil((high - low + 1) / LINES)
    lines = []
    for start in range(low, high + 1, step):
        inside = range(start, min(start + step, high + 1))
        lines.append((
            str(start) if len(inside) == 1 else f"{start}-{inside[-1]}",
            sum(clips.get(count, 0) for count in inside),
            ", ".join(f"{name} {at}" if step > 1 else name for at, name in sorted(marks.items()) if at in inside),
        ))
    most = max(number for _, number, _ in lines)
    text = []
    for label, number, mark in lines:
        bar = "#" * math.ceil(WIDTH * number / most)
        text.append(f"{label:>7} {number:>6} {bar}{'  <- ' * bool(mark)}{mark}".rstrip())
    return "\n".join(text)


def _row(choice: Choice, full: int) -> list[str]:
    left = "as the data asks" if choice.budgets is None else ",".join(map(str, choice.budgets))
    costs = [f"{choice.flops / 1e12:.4g}", f"{100 * choice.flops / full:.1f} %"]
    return [choice.name, left, *costs, *_agreement(choice.agreement)]


def _agreement(found: Agreement | None) -> list[str]:
    if found is None:
        return [""] * 4
    shares = [f"{100 * number / found.clips:.1f} % of {found.clips}" for number in (found.equal, found.same)]
    return [*shares, f"{found.differing:.1f} ({found.most})", f"{found.missing:.1f}"]


def _proposed(found: Calibration) -> str:
    budgets, percentile = ",".join(map(str, found.proposal.budgets)), found.proposal.percentile
    where = "fewer than the rules leave of any" if percentile is None else f"percentile {percentile:g} of the clips"
    bound = "" if found.target_flops is None else (
        f", the largest within {found.target_flops / 1e12:.4g} TFLOP, {100 * found.target_flops / found.full:.1f} % of "
        "the unpruned tower"
    )
    return f"proposed frame budgets {budgets}: {where}{bound}"
