"""The configuration of EarlyTom: one frozen object, checked when it is made, the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from .errors import ConfigError

METHODS = ("attention", "dpc-knn")
ATTENTION_FORMS = ("fused", "primitives")  # of the tower: one operator, or written out


def kept_count(length: int, ratio: float) -> int:
    """How many of `length` visual tokens stay when the share `ratio` is merged away: round(length * (1 - ratio)).

    Half goes to even, as in the released code; at least one token stays of any, none of none.
    """
    return min(length, max(1, round(length * (1 - ratio))))


@dataclass(frozen=True)
class InnerMerging:
    """Merge visual tokens before decoder layer `layer` (>= 1), in prefill only.

    ratio: share of the visual tokens that is merged away, in [0, 1). method: `attention` keeps the tokens the last
    prompt token attends to most at layer - 1; `dpc-knn` keeps cluster centres. as_released: in prefill every token of
    layer - 1 sees every other, those after it too, as in the released code under SDPA, by which the published figures
    were made (docs/method.md, quirk 3); else the layer is causal, as the model was trained. Raises ConfigError.
    """

    layer: int
    ratio: float = 0.5
    method: str = "attention"
    as_released: bool = field(default=False, metadata={"may_lack": True})  # as manifests from before it do

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ConfigError(
                f"inner merging at layer {self.layer!r} cannot be: the layer must be an integer of at least 1, "
                "because the attention of the layer before it decides what stays"
            )
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 <= self.ratio < 1:
            raise ConfigError(
                f"inner merging with ratio {self.ratio!r} cannot be: the ratio is the share of visual tokens merged "
                "away, a number from 0 (none) to below 1"
            )
        if self.method not in METHODS:
            raise ConfigError(f"inner merging has no method {self.method!r}, it must be one of {', '.join(METHODS)}")
        if not isinstance(self.as_released, bool):
            raise ConfigError(f"as_released of inner merging is {self.as_released!r}, it must be true or false")
        if self.as_released and self.method != "attention":
            raise ConfigError(
                f"inner merging as released goes by attention, not by {self.method}: the released code has no other "
                "method, so leave one of the two out"
            )

    def removed(self, length: int) -> int:
        """How many of `length` visual tokens are merged away."""
        return length - kept_count(length, self.ratio)


POOLING = ("bilinear", "average", "max")
NEWLINES = ("one_token", "grid", "no_token")

# Shares of T that the merge layers leave: about what tau = .3-.5 gives on redundant video (docs/method.md, section 4).
BUDGET_SHARES = (0.625, 0.375, 0.25)


def default_budgets(frames: int, retain: float, merges: int) -> tuple[int, ...]:
    """Frame budgets for `merges` merge layers: 20, 12, 8 of 32 frames, never fewer than retain * frames."""
    last = len(BUDGET_SHARES) - 1
    least = least_frames(frames, retain)
    budgets: list[int] = []
    for i in range(merges):
        at = last if merges == 1 else i * last / (merges - 1)
        low = math.floor(at)
        high = min(low + 1, last)
        share = BUDGET_SHARES[low] + (at - low) * (BUDGET_SHARES[high] - BUDGET_SHARES[low])
        budgets.append(min(budgets[-1] if budgets else frames, max(round(frames * share), least)))
    return tuple(budgets)


def least_frames(frames: int, retain: float) -> int:
    """The smallest budget that can hold retain * frames frames' worth of tokens."""
    return max(1, math.ceil(retain * frames - 1e-9))


class Segmenting(TypedDict):
    """What `segments`, `plan` and the oracle cut a clip by; see EarlyTomConfig."""

    tau: float
    max_window: int
    ema: float


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
        least = least_frames(self.frames, self.retain)
        if budgets[-1] < least:
            raise ConfigError(
                f"the last frame budget {budgets[-1]} cannot hold retain {self.retain:g} of {self.frames} frames: "
                f"at least {least} frames are needed, or a retain of at most {budgets[-1] / self.frames:g}"
            )

    @property
    def segmenting(self) -> Segmenting:
        return {"tau": self.tau, "max_window": self.max_window, "ema": self.ema}

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


def _inner_from_dict(values: Mapping[str, Any]) -> InnerMerging:
    known = [f.name for f in fields(InnerMerging)]
    unknown = sorted(set(values) - set(known))
    if unknown or "layer" not in values:
        raise ConfigError(
            f"inner has the keys {', '.join(sorted(values))}, it takes layer and may have ratio, method, as_released"
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
