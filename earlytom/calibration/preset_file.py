"""Calibrated settings as a file: strict JSON that `earlytom-export --preset FILE` takes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..config import EarlyTomConfig
from ..errors import ConfigError
from ..files import replacing

VERSION = 1  # that this program writes, and the newest that it reads
LARGEST = 2**16  # bytes of a file that can be one


@dataclass(frozen=True)
class Origin:
    """What a preset was made from.

    checkpoint, digest: name and weights_digest; layers: encoder layers that its tower uses; clips: how many were
    counted; percentile: of the clips, or None for budgets below all of theirs; target_flops: of the tower, a call, that
    budgets were chosen to stay within, or None.
    """

    checkpoint: str
    digest: str
    layers: int
    clips: int
    percentile: float | None
    target_flops: float | None


@dataclass(frozen=True)
class CalibratedPreset:
    """Settings as in EarlyTomConfig, and what they were made from. Raises ConfigError on an impossible combination."""

    name: str
    retain: float
    frames: int
    merge_layers: tuple[int, ...]
    frame_budgets: tuple[int, ...]
    tau: float
    max_window: int
    ema: float
    made_from: Origin
    version: int = VERSION

    def __post_init__(self) -> None:
        EarlyTomConfig(**self.settings)
        layers = self.made_from.layers
        if not self.merge_layers or self.merge_layers[-1] >= layers:
            raise ConfigError(
                f"merge_layers are {_join(self.merge_layers) or 'none'}, they must lie in the {layers} layers that it "
                "was made from"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments for EarlyTomConfig."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in _SETTINGS}

    def check_fits(self, layers: int, changes: Mapping[str, Any]) -> None:
        """Raise ConfigError unless the preset is for a tower that uses `layers`, and its budgets for the settings that
        are left when `changes` take the place of its own."""
        if layers != self.made_from.layers:
            raise ConfigError(
                f"the preset {self.name} was made from a tower of {self.made_from.layers} layers "
                f"({self.made_from.checkpoint}), the checkpoint's has {layers}: calibrate on this checkpoint"
            )
        if "frame_budgets" in changes:
            return
        for name in ("frames", "merge_layers"):
            if name in changes and changes[name] != getattr(self, name):
                own, other = (_show(value) for value in (getattr(self, name), changes[name]))
                raise ConfigError(
                    f"the preset {self.name} has frame budgets for {name} {own}, not for {other}: give frame budgets "
                    f"too, or calibrate with {name} {other}"
                )

    def to_json(self) -> str:
        """Text of the file: the same bytes for the same preset."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Whole or not at all. Raises ConfigError."""
        try:
            with replacing(path) as temporary:
                temporary.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the preset cannot be written to {path}: {error.strerror or error}") from None


_SETTINGS = {field.name for field in fields(EarlyTomConfig)}


def read_preset(path: Path) -> CalibratedPreset:
    """The preset that `write` wrote. Raises ConfigError: no such file, no preset, newer, or impossible settings."""
    try:
        if path.is_file() and path.stat().st_size > LARGEST:
            raise ConfigError(f"{path} is no preset: it has {path.stat().st_size} bytes")
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse)
    except OSError as error:
        raise ConfigError(f"the preset {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
        raise ConfigError(f"{path} is no preset: {error}") from None
    try:
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is int and version > VERSION:
            raise ConfigError(f"it has version {version} and this program reads version {VERSION}: upgrade "
                              "earlytom-export")
        values = _object(content, CalibratedPreset, "it")
        if version != VERSION:
            raise ConfigError(f"version is {version!r}, this program knows version {VERSION}")
        origin = Origin(**_object(values.pop("made_from"), Origin, "made_from"))
        return CalibratedPreset(**values, made_from=origin)
    except ConfigError as error:
        raise ConfigError(f"the preset {path} cannot be used: {error}") from None


def _object(value: Any, kind: type[Any], where: str) -> dict[str, Any]:
    """`value`, parsed JSON, as the fields of `kind`, each checked. Raises ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r:.40}, it must be an object")
    names = [field.name for field in fields(kind)]
    odd = [f"unknown {name}" for name in sorted(value.keys() - names)]
    odd += [f"no {name}" for name in names if name not in value]
    if odd:
        raise ConfigError(f"{where} has {', '.join(odd)}")
    return {field.name: _READERS[str(field.type)](value[field.name], field.name) for field in fields(kind)}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r:.40}, it must be a text")
    return value


def _whole(value: Any, name: str) -> int:
    if type(value) is not int:
        raise ConfigError(f"{name} is {value!r:.40}, it must be a whole number")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r:.40}, it must be a finite number")
    return float(value)


def _perhaps_number(value: Any, name: str) -> float | None:
    return None if value is None else _number(value, name)


def _wholes(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise ConfigError(f"{name} is {value!r:.40}, it must be a list of whole numbers")
    return tuple(value)


_READERS: dict[str, Callable[[Any, str], Any]] = {  # by annotation
    "str": _text, "int": _whole, "float": _number, "float | None": _perhaps_number, "tuple[int, ...]": _wholes,
    "Origin": lambda value, name: value,
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key appears twice")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _show(value: Any) -> str:
    return _join(value) if isinstance(value, tuple) else str(value)


def _join(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
