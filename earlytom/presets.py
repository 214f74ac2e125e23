"""Published settings: those of the released code's scripts, and those of its environment variables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import EarlyTomConfig, InnerMerging
from .errors import ConfigError

RATIOS = (0.10, 0.15, 0.20, 0.25)

# Published settings (scripts/ov and scripts/llava-vid of the released code): tau and merge layers for each of RATIOS.
_LATE, _EARLY, _MVBENCH = (10, 21, 23), (8, 21, 23), (6, 14, 20)
PRESETS: dict[str, tuple[tuple[float, tuple[int, ...]], ...]] = {
    "mvbench": ((0.65, (8, 14, 20)), (0.8, _MVBENCH), (0.8, _MVBENCH), (0.8, _MVBENCH)),
    "videomme": ((0.3, _LATE), (0.4, _EARLY), (0.5, _EARLY), (0.7, _LATE)),
    "longvideobench": ((0.3, _LATE), (0.5, _LATE), (0.6, _LATE), (0.8, (4, 14, 24))),
    "egoschema": ((0.3, _LATE), (0.5, _LATE), (0.6, _LATE), (0.7, _LATE)),
}
# Where LLaVA-Video-7B was run with other settings than LLaVA-OneVision.
LLAVA_VIDEO_PRESETS: dict[tuple[str, float], tuple[float, tuple[int, ...]]] = {
    ("videomme", 0.25): (0.6, _LATE),
    ("longvideobench", 0.25): (0.8, (6, 21, 23)),
}
PUBLISHED_DEPTH = 26  # encoder layers used of so400m: what the layer numbers above refer to
PUBLISHED_INNER, PUBLISHED_LLM_LAYERS = 18, 28  # inner merging before layer 18 of Qwen2-7B's 28


def preset(
    benchmark: str = "videomme",
    retain: float = 0.2,
    *,
    model: str = "llava-onevision",
    depth: int | None = None,
    llm_layers: int | None = None,
    **changes: Any,
) -> EarlyTomConfig:
    """The published settings for `benchmark` at `retain`; another ratio takes those of the nearest published one.

    model: "llava-onevision" (32 frames) or "llava-video" (64 frames, average pooling, grid newlines). depth: layers the
    tower uses; the published layer numbers are for 26 and are scaled to another depth. llm_layers: of the LLM, see
    `published_inner`. changes: settings to override. Source: scripts/ov and scripts/llava-vid of the released code.
    """
    if benchmark not in PRESETS:
        raise ConfigError(f"there is no preset {benchmark!r}, the published ones are {', '.join(PRESETS)}")
    if model not in ("llava-onevision", "llava-video"):
        raise ConfigError(f"there are no published settings for {model!r}, only for llava-onevision and llava-video")
    if not (isinstance(retain, (int, float)) and math.isfinite(retain)):
        raise ConfigError(f"retain is {retain!r}, it must be a number above 0 and at most 1, for example 0.2")
    index = min(range(len(RATIOS)), key=lambda i: abs(RATIOS[i] - retain))
    tau, layers = PRESETS[benchmark][index]
    settings: dict[str, Any] = {"retain": retain, "inner": published_inner(llm_layers)}
    if model == "llava-video":
        tau, layers = LLAVA_VIDEO_PRESETS.get((benchmark, RATIOS[index]), (tau, layers))
        settings |= {"frames": 64, "pooling": "average", "newline": "grid"}
    settings |= {"tau": tau, "merge_layers": layers if depth is None else scale_layers(layers, depth)}
    return EarlyTomConfig(**(settings | changes))


def published_inner(llm_layers: int | None = None) -> InnerMerging | None:
    """Inner merging before layer 18 at ratio .5, as published for LLaVA-OneVision-7B, whose LLM has 28 layers.

    In an LLM of 18 layers or fewer it is the layer of the same relative depth, at least 1; with a single layer there is
    none before which to merge: None.
    """
    if llm_layers is None or llm_layers > PUBLISHED_INNER:
        return InnerMerging(layer=PUBLISHED_INNER, ratio=0.5)
    layer = max(1, PUBLISHED_INNER * llm_layers // PUBLISHED_LLM_LAYERS)
    return InnerMerging(layer=layer, ratio=0.5) if layer < llm_layers else None


def scale_layers(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Published merge layers moved to a tower that uses `depth` layers: same relative depth, each at most once."""
    if depth == PUBLISHED_DEPTH:
        return layers
    return tuple(sorted({min(depth - 1, layer * depth // PUBLISHED_DEPTH) for layer in layers}))


def environment_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """Settings named by the released code's environment variables, as keyword arguments for EarlyTomConfig.

    RETAIN_RATIO, T (tau), M, EMA, PRUNE_LAYERS, INNER_k with INNER_r, BETA, D, K. Only variables that are set appear.
    The released code reads them inside `forward`, with defaults that disagree (quirk 8); here the wrapper and the
    scripts read them, once. Raises ConfigError naming the variable that is not a number.
    """
    def read(name: str, kind: type) -> Any:
        try:
            return kind(environ[name])
        except ValueError:
            raise ConfigError(f"the environment variable {name} is {environ[name]!r}, it must be a number") from None

    names = {"RETAIN_RATIO": ("retain", float), "T": ("tau", float), "M": ("max_window", int), "EMA": ("ema", float),
             "BETA": ("beta", float), "D": ("contextual", float), "K": ("neighbours", int)}
    settings = {setting: read(name, kind) for name, (setting, kind) in names.items() if environ.get(name)}
    if environ.get("PRUNE_LAYERS"):
        try:
            settings["merge_layers"] = tuple(int(x) for x in environ["PRUNE_LAYERS"].split(","))
        except ValueError:
            raise ConfigError(
                f"the environment variable PRUNE_LAYERS is {environ['PRUNE_LAYERS']!r}, it must be layer numbers "
                "separated by commas, for example 8,21,23"
            ) from None
    if environ.get("INNER_k") and environ.get("INNER_r"):  # the original merges only when both are set
        settings["inner"] = InnerMerging(layer=read("INNER_k", int), ratio=read("INNER_r", float))
    return settings
