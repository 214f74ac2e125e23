"""JSON back into frozen dataclasses, strictly: what is missing, unknown or of another type is refused by name."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, TypeVar

from ..errors import InputError

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,)}
_T = TypeVar("_T")


def read(kind: type[_T], values: Any, *, derived: tuple[str, ...] = (), **given: Any) -> _T:
    """An instance of the dataclass `kind` from JSON: `given` fields as they are, `derived` keys follow from others."""
    expected = [f for f in fields(kind) if f.name not in given]  # type: ignore[arg-type]
    needed = {f.name for f in expected} | set(derived)
    if not isinstance(values, dict):
        raise InputError(f"{values!r:.60} is no {kind.__name__}")
    odd = [f"unknown {n}" for n in sorted(values.keys() - needed - given.keys())]
    odd += [f"no {n}" for n in sorted(needed - values.keys())]
    for f in expected:
        base, value = str(f.type).removesuffix(" | None"), values.get(f.name)
        if not (type(value) in _TYPES[base] or (value is None and (base != f.type or base == "float"))):
            odd.append(f"{f.name} {value!r:.60}")
    if odd:
        raise InputError(f"a {kind.__name__} has {', '.join(odd)}")
    null = {"float": math.inf}
    return kind(**given, **{f.name: null.get(str(f.type)) if (x := values[f.name]) is None else x for f in expected})


def read_list(values: Any, name: str) -> list[Any]:
    found = values.get(name) if isinstance(values, dict) else None
    if not isinstance(found, list):
        raise InputError(f"{name} is {found!r:.60}, it must be a list")
    return found
