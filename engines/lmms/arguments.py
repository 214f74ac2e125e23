"""`--model_args` of lmms-eval's model earlytom: one frozen object, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from earlytom.config import POOLING
from earlytom.dtypes import check_dtype
from earlytom.errors import ConfigError
from earlytom.presets import PRESETS

from ..products import ENGINES

BUDGETS = ("fixed", "data")
INNER = ("on", "off", "as-released")
OF_BUNDLES = ("engine", "threads")
OF_CHECKPOINTS = ("retain", "preset", "frames", "pooling")  # a bundle was made with its own


@dataclass(frozen=True)
class ModelArguments:
    """A bundle, or a checkpoint with a retain ratio in PyTorch, and how it is run; None is the default of each.

    bundle: directory; checkpoint: directory, hub id or "demo", with a bundle only where the weights are not where it
    says. Of a checkpoint alone: retain, 1 for the unpruned model; preset: published settings, of PRESETS (default
    videomme); frames: T; pooling: in place of the checkpoint's own. frame_budgets: "fixed" as an engine computes, or
    following the "data" as published; default: the bundle's, of a checkpoint alone data. inner: merging inside the LLM
    "on", "off" or "as-released" (docs/method.md, quirk 3). engine, threads: of a bundle. device, dtype, attention,
    compile: of the language model, see `open_pipeline`. batch_size: questions that the language model answers at once.
    Raises ConfigError.
    """

    bundle: str | None = None
    checkpoint: str | None = None
    retain: float | None = None
    preset: str | None = None
    frames: int | None = None
    pooling: str | None = None
    frame_budgets: str | None = None
    inner: str = "on"
    engine: str | None = None
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    compile: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.bundle is None:
            self._check_checkpoint()
        elif given := [name for name in OF_CHECKPOINTS if getattr(self, name) is not None]:
            raise ConfigError(
                f"{' and '.join(given)} cannot go with bundle: a bundle was exported with its own; leave "
                f"{'it' if len(given) == 1 else 'them'} out, or give checkpoint in place of bundle"
            )
        engines = ("auto", *ENGINES)
        for name, allowed in (("frame_budgets", BUDGETS), ("inner", INNER), ("preset", tuple(PRESETS)),
                              ("pooling", POOLING), ("engine", engines)):
            if (value := getattr(self, name)) is not None and value not in allowed:
                raise ConfigError(f"{name} is {value!r}, it must be one of {', '.join(allowed)}")
        for name in ("frames", "threads", "batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}, it must be a whole number of at least 1")
        if self.dtype is not None:
            check_dtype(self.dtype)
        if not isinstance(self.compile, bool):
            raise ConfigError(f"compile is {self.compile!r}, it must be true or false")
        if self.compile and self.batch_size > 1:
            raise ConfigError(f"compile goes with batch_size 1, not {self.batch_size}: one sequence is decoded then")
        if self.bundle is not None and self.frame_budgets == "data" and self.engine != "torch":
            raise ConfigError("frame_budgets=data goes with engine=torch: an engine's frame counts are fixed")

    def _check_checkpoint(self) -> None:
        if self.checkpoint is None:
            raise ConfigError("give bundle=DIR, or checkpoint=PATH with retain=R, for example checkpoint=demo,retain=1")
        if given := [name for name in OF_BUNDLES if getattr(self, name) is not None]:
            raise ConfigError(f"{' and '.join(given)} goes with bundle: a checkpoint alone runs in PyTorch")
        retain = self.retain
        number = isinstance(retain, (int, float)) and not isinstance(retain, bool) and math.isfinite(retain)
        if not number or not 0 < float(retain or 0) <= 1:
            raise ConfigError(
                f"retain is {retain!r}, with a checkpoint it must be a number above 0 and at most 1, such as 0.2; "
                "1 is the unpruned model"
            )
        if self.unpruned and (given := [name for name in ("preset", "frame_budgets") if getattr(self, name)]):
            raise ConfigError(f"{' and '.join(given)} cannot go with retain=1: nothing of the unpruned model is merged")
        if self.unpruned and self.inner == "as-released":
            raise ConfigError("inner=as-released cannot go with retain=1: nothing of the unpruned model is merged")

    @property
    def unpruned(self) -> bool:
        """Whether all visual tokens are kept, to and through the language model."""
        return self.bundle is None and self.retain == 1


# What lmms-eval makes of a value depends on how it looks: a path of digits comes as a number.
TEXTS = {f.name for f in fields(ModelArguments) if "str" in str(f.type)}


def read_arguments(values: Mapping[str, Any]) -> ModelArguments:
    """The arguments as lmms-eval hands them over: from `--model_args`, `--batch_size` and `--device`.

    Raises ConfigError, also for a name that is none of them.
    """
    known = [f.name for f in fields(ModelArguments)]
    if unknown := [name for name in values if name not in known]:
        raise ConfigError(f"there is no argument {', '.join(unknown)}: the arguments are {', '.join(known)}")
    return ModelArguments(**{name: _read(name, value) for name, value in values.items()})


def parse_arguments(text: str) -> ModelArguments:
    """The same from the text of `--model_args`, as it stands in lmms-eval's result files."""
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, found, value = part.partition("=")
        if not found:
            raise ConfigError(f"the model_args {text!r} are no list of name=value")
        values[name.strip()] = _value(value)
    return read_arguments(values)


def _read(name: str, value: Any) -> Any:
    if name in TEXTS and value is not None:
        return str(value)
    if name == "batch_size" and isinstance(value, str) and value.isdecimal():  # what lmms-eval's own option gives
        return int(value)
    return value


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
