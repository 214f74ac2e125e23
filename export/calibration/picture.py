"""A calibration as a picture: a histogram for each merge layer, with the budgets in it."""

from __future__ import annotations

from pathlib import Path

from earlytom.calibration.result import Calibration
from earlytom.demo.plot import new_figure, save_figure


def draw_histograms(found: Calibration, path: Path) -> None:
    """PNG or SVG by the suffix; the same file for the same calibration. Raises ConfigError, InputError."""
    layers, full = found.config.merge_layers, found.full
    fixed = [(choice, choice.budgets) for choice in found.choices if choice.budgets is not None]
    figure = new_figure(8, 1 + 2 * len(layers))
    rows = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for stage, (layer, axes) in enumerate(zip(layers, rows)):
        bars = found.histogram(stage)
        axes.bar(list(bars), list(bars.values()), width=0.8, color="lightgrey", edgecolor="grey")
        for i, (choice, budgets) in enumerate(fixed):
            label = f"{choice.name}: {','.join(map(str, budgets))}, {100 * choice.flops / full:.0f} % of the FLOPs"
            axes.axvline(budgets[stage], color=f"C{i}", linestyle="-" if i else "--", label=label)
        axes.set(ylabel=f"clips\nafter layer {layer}", xlim=(0.5, found.config.frames + 0.5))
        axes.yaxis.get_major_locator().set_params(integer=True)
    rows[0].legend(fontsize="small")
    clips = f"{len(found.clips)} clips of {found.config.frames} frames"
    rows[0].set_title(f"frames that the released rules leave of {clips}")
    rows[-1].set_xlabel("frames left")
    save_figure(figure, path)
