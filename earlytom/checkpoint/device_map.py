"""Device maps as accelerate and transformers know them, checked: one place for each block of the language model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .files import read_json
from .keys import summarise

Place = int | str  # the number of a card, "cpu" or "disk"
AUTO = "auto"
EMBEDDING, ROTARY, HEAD = "model.embed_tokens", "model.rotary_emb", "lm_head"


def read_device_map(given: str | Path | Mapping[str, Any]) -> dict[str, Place] | None:
    """A map as it was given, from module names to places, or from a JSON file that holds it; None for "auto".

    Places: the number of a card, "cuda", "cuda:<number>", "cpu" and "disk". Raises ConfigError.
    """
    if given == AUTO:
        return None
    if isinstance(given, (str, Path)):
        where = f"the device map {given}"
        try:
            given = read_json(Path(given).expanduser())
        except (CheckpointError, RuntimeError) as error:  # no such user's ~
            raise ConfigError(f"there is no device map, auto or a JSON file from modules to devices: {error}") from None
    else:
        where = "the device map"
    if not given:
        raise ConfigError(f"{where} is empty: it must name a device for each module, or for all as in {{'': 'cpu'}}")
    return {name: _place(where, name, value) for name, value in given.items()}


def _place(where: str, name: str, value: Any) -> Place:
    if value in ("cpu", "disk"):
        return str(value)
    card = re.fullmatch(r"(?:cuda:)?(\d+)", "cuda:0" if value == "cuda" else str(value))
    if card is None or isinstance(value, bool):
        raise ConfigError(
            f"{where} puts {name!r} on {value!r}, it must be the number of a card such as 0, or cuda:0, cpu or disk"
        )
    return int(card[1])


@dataclass(frozen=True)
class Placement:
    """places: where each block lies, in the model's order; each decoder layer is a block.

    A block on a card computes there. One in memory or on disk computes on `main`, to which its weights are brought for
    as long as it runs: the embedding's card, or the first of those named, or the CPU if there is no card.
    """

    places: Mapping[str, Place]

    @property
    def main(self) -> str:
        """As torch names the device."""
        return main_device(self.places)

    @property
    def is_spread(self) -> bool:
        """Whether it takes more than putting all weights on one device."""
        return len(set(self.places.values())) > 1 or "disk" in self.places.values()

    def of(self, parameter: str) -> Place:
        """Where a parameter of the language model lies."""
        return next(place for block, place in self.places.items() if parameter.startswith(block + "."))


def main_device(places: Mapping[str, Place]) -> str:
    """See Placement, of a map that may name modules in other ways as well."""
    cards = [place for place in places.values() if isinstance(place, int)]
    first = places.get(EMBEDDING)
    return f"cuda:{first if isinstance(first, int) else min(cards)}" if cards else "cpu"


def place_blocks(given: Mapping[str, Place], layers: int, *, tied: bool) -> Placement:
    """The place of each block of a Qwen2 with so many layers, by the longest name in the map that it begins with.

    tied: the output head is the embedding's matrix. The rotary table, which has no weights, may be left out.
    Raises ConfigError on names of nothing, on blocks without a place or with several, on a tied matrix in two places.
    """
    blocks = [EMBEDDING, *(f"model.layers.{i}" for i in range(layers)), "model.norm", ROTARY, HEAD]
    places: dict[str, Place] = {}
    missing = []
    for block in blocks:
        names = [name for name in given if not name or block == name or block.startswith(name + ".")]
        if names:
            places[block] = given[max(names, key=len)]
        elif block == ROTARY:
            places[block] = places.get(EMBEDDING, "cpu")
        else:
            missing.append(block)
    for name, place in given.items():
        within = [block for block in blocks if name.startswith(block + ".")]
        if within and places.get(within[0]) != place:
            raise ConfigError(f"the device map names {name}, a part of {within[0]}, which must stay whole: name that")
        if not within and not any(not name or block == name or block.startswith(name + ".") for block in blocks):
            raise ConfigError(
                f"the device map names {name}, which the language model does not have: its modules are {EMBEDDING}, "
                f"model.layers.0 to model.layers.{layers - 1}, model.norm and {HEAD}"
            )
    if missing:
        raise ConfigError(f"the device map has no device for {summarise(missing)}")
    if tied and places[EMBEDDING] != places[HEAD]:
        raise ConfigError(
            f"the device map puts {EMBEDDING} on {places[EMBEDDING]} and {HEAD} on {places[HEAD]}, which are one "
            "matrix in this checkpoint: give both one place"
        )
    return Placement(places)
