"""The configuration of EarlyTom: one frozen object, checked when it is made, the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError
from .inner import InnerMerging

POOLING = ("bilinear", "average", "max")
NEWLINES = ("one_token", "grid", "no_token")

# Shares of T that the merge layers leave: about what tau = .3-.5 gives on redundant video (docs/method.md, section 4).
BUDGET_SHARES = (0.625, 0.375, 0.25)

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


def default_budgets(frames: int, retain: float, merges: int) -> tuple[int, ...]:
    """Frame budgets for `merges` merge layers: 20, 12, 8 of 32 frames, never fewer than retain * frames."""
    last = len(BUDGET_SHARES) - 1
    least = _least_frames(frames, retain)
    budgets: list[int] = []
    for i in range(merges):
        at = last if merges == 1 else i * last / (merges - 1)
        low = math.floor(at)
        high = min(low + 1, last)
        share = BUDGET_SHARES[low] + (at - low) * (BUDGET_SHARES[high] - BUDGET_SHARES[low])
        budgets.append(min(budgets[-1] if budgets else frames, max(round(frames * share), least)))
    return tuple(budgets)


def _least_frames(frames: int, retain: float) -> int:
    """The smallest budget that can hold retain * frames frames' worth of tokens."""
    return max(1, math.ceil(retain * frames - 1e-9))


@dataclass(frozen=True)
class EarlyTomConfig:
    """What EarlyTom does to a video model; symbols as in the paper.

    retain: r, share of the T * P visual tokens that reach the LLM; frames: T; merge_layers: encoder layers after which
    frames are merged; frame_budgets: frames left after each of them (default: 20, 12, 8 of 32, scaled); tau,
    max_window, ema: similarity threshold, window bound M and smoothing of the segments; pooling and newline:
    LLaVA-NeXT's `mm_spatial_pool_mode` and `mm_newline_position`; inner: merging inside the LLM, or None; contextual:
    D, share of a dynamic frame's budget for DPC-KNN tokens; beta and neighbours: its blend and K.

    Without merge layers nothing is pruned: retain must then be 1. Raises ConfigError on an impossible combination.
    """

    retain: float = 0.2
    frames: int = 32
    merge_layers: tuple[int, ...] = (8, 21, 23)
    frame_budgets: tuple[int, ...] = None  # type: ignore[assignment]  # None is replaced below
    tau: float = 0.5
    max_window: int = 6
    ema: float = 0.9
    pooling: str = "bilinear"
    newline: str = "one_token"
    inner: InnerMerging | None = None
    contextual: float = 0.0
    beta: float = 0.6
    neighbours: int = 7

    def __post_init__(self) -> None:
        if isinstance(self.inner, Mapping):
            object.__setattr__(self, "inner", _inner_from_dict(self.inner))
        for name in ("retain", "tau", "ema", "contextual", "beta"):
            _set_number(self, name)
        for name in ("frames", "max_window", "neighbours"):
            _set_integer(self, name)
        _set_integers(self, "merge_layers")
        if not 0 < self.retain <= 1:
            raise ConfigError(f"retain is {self.retain:g}, it must be above 0 and at most 1, for example 0.2")
        if self.frames < 1:
            raise ConfigError(f"frames is {self.frames}, it must be at least 1")
        if self.frame_budgets is None:
            object.__setattr__(self, "frame_budgets", default_budgets(self.frames, self.retain, len(self.merge_layers)))
        _set_integers(self, "frame_budgets")
        self._check_merging()
        for name, low, high in (("tau", -1, 1), ("ema", 0, 1), ("beta", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name):g}, it must lie in {low}..{high}")
        if self.max_window < 2:
            raise ConfigError(
                f"max_window is {self.max_window}, it must be at least 2: a segment holds at most max_window - 1 frames"
            )
        if not 0 <= self.contextual < 1:
            raise ConfigError(f"contextual is {self.contextual:g}, it must be at least 0 and below 1")
        if self.neighbours < 1:
            raise ConfigError(f"neighbours is {self.neighbours}, it must be at least 1")
        for name, allowed in (("pooling", POOLING), ("newline", NEWLINES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, it must be one of {', '.join(allowed)}")
        if self.inner is not None and not isinstance(self.inner, InnerMerging):
            raise ConfigError(f"inner is a {type(self.inner).__name__}, it must be an InnerMerging or None")

    def _check_merging(self) -> None:
        layers, budgets = self.merge_layers, self.frame_budgets
        if any(layer < 0 for layer in layers) or any(b <= a for a, b in zip(layers, layers[1:])):
            raise ConfigError(f"merge_layers are {_join(layers)}, they must be 0 or more and strictly increasing")
        if not layers:
            if budgets:
                raise ConfigError(f"frame_budgets are {_join(budgets)}, but there are no merge layers to apply them at")
            if self.retain != 1:
                raise ConfigError(
                    f"retain is {self.retain:g} without merge layers: nothing can be pruned, so give merge layers "
                    "or retain 1"
                )
            return
        if len(budgets) != len(layers):
            raise ConfigError(
                f"{len(budgets)} frame_budgets ({_join(budgets)}) for {len(layers)} merge_layers ({_join(layers)}): "
                "give one budget for each layer"
            )
        for before, after, layer in zip((self.frames, *budgets), budgets, layers):
            if after > before:
                raise ConfigError(
                    f"the frame budget {after} after layer {layer} is more than the {before} frames that enter it: "
                    f"budgets must not grow, at most {before} fits"
                )
        least = _least_frames(self.frames, self.retain)
        if budgets[-1] < least:
            raise ConfigError(
                f"the last frame budget {budgets[-1]} cannot hold retain {self.retain:g} of {self.frames} frames: "
                f"at least {least} frames are needed, or a retain of at most {budgets[-1] / self.frames:g}"
            )

    def replace(self, **changes: Any) -> EarlyTomConfig:
        """A copy with `changes`; budgets are derived anew when what they follow from changes and they are not given."""
        if {"retain", "frames", "merge_layers"} & changes.keys() and "frame_budgets" not in changes:
            changes["frame_budgets"] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for name in ("merge_layers", "frame_budgets"):
            values[name] = list(values[name])
        return values

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EarlyTomConfig:
        """The configuration that `to_dict` gave. Raises ConfigError on a name that is not a setting."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}: the settings are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> EarlyTomConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"the configuration is a JSON {type(values).__name__}, it must be an object of settings")
        return cls.from_dict(values)


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


def _inner_from_dict(values: Mapping[str, Any]) -> InnerMerging:
    known = [f.name for f in fields(InnerMerging)]
    unknown = sorted(set(values) - set(known))
    if unknown or "layer" not in values:
        raise ConfigError(
            f"inner has the keys {', '.join(sorted(values))}, it takes layer and optionally ratio and method"
        )
    return InnerMerging(**values)


def _join(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values)) or "none"


def _set_number(config: EarlyTomConfig, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}, it must be a finite number")
    object.__setattr__(config, name, float(value))


def _set_integer(config: EarlyTomConfig, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}, it must be a whole number")


def _set_integers(config: EarlyTomConfig, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, (list, tuple)) or any(isinstance(x, bool) or not isinstance(x, int) for x in value):
        raise ConfigError(f"{name} is {value!r}, it must be a list of whole numbers")
    object.__setattr__(config, name, tuple(value))
