"""What is measured: who takes part, on what, how often. No torch: `--help` and mistakes cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from earlytom.errors import ConfigError

from ..products import ENGINES

EAGER, SDPA = "transformers-eager", "transformers-sdpa"
RELEASED, ADAPTIVE, STATIC, COMPILED = "released", "adaptive", "static", "compiled"
# Contestant -> what it is, for people. Their order is that of the tables.
CONTESTANTS = {
    EAGER: "full tokens, transformers' own LLaVA-OneVision, eager attention",
    SDPA: "full tokens, transformers' own LLaVA-OneVision, SDPA",
    RELEASED: "EarlyTom as its authors run it: eager attention, whole attention matrices merged, loops",
    ADAPTIVE: "data-dependent frame counts without loops, fused attention, PyTorch",
    STATIC: "static shapes, PyTorch",
    COMPILED: "static shapes, torch.compile",
    **{name: f"static shapes, {engine.title}" for name, engine in ENGINES.items() if not engine.needs_weights},
}
WHOLE = (EAGER, SDPA)  # models that are asked as one, not a tower and our Qwen2
BUNDLED = tuple(name for name, engine in ENGINES.items() if not engine.needs_weights)
INNER = ("both", "on", "off")
PROMPT = "What happens in this video?"


@dataclass(frozen=True)
class Settings:
    """One measurement; it is written into the results as it is.

    contestants: of CONTESTANTS, () for all that can take part. checkpoint: a path, a hub id or "demo"; full_size:
    "0.5b" or "7b" with random weights in its place; bundle: its engines take part, with its configuration. frames,
    retain: of the preset, without a bundle. new_tokens: of every answer, which may not end earlier. runs, warm_up:
    rounds; seconds: after which no further round begins. inner: merging inside the LLM "on", "off" or "both".
    vision_only: the towers alone, no language model. dtype: of tower and language model; None: the bundle's for the
    towers, else bf16 on a card and fp32 on a CPU, and so for the language model. Raises ConfigError.
    """

    contestants: tuple[str, ...] = ()
    checkpoint: str | None = None
    full_size: str | None = None
    bundle: str | None = None
    video: str | None = None
    frames: int = 32
    retain: float = 0.2
    prompt: str = PROMPT
    new_tokens: int = 16
    runs: int = 10
    warm_up: int = 2
    seconds: float | None = None
    inner: str = "both"
    vision_only: bool = False
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "contestants", check_contestants(self.contestants))
        for name, least in (("runs", 1), ("warm_up", 0), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least {least}")
        if self.inner not in INNER:
            raise ConfigError(f"inner is {self.inner!r}, it must be {', '.join(INNER[:-1])} or {INNER[-1]}")
        if self.checkpoint and self.full_size:
            raise ConfigError("a full size has random weights, so it does not go with a checkpoint")
        if self.vision_only and (wrong := [name for name in self.contestants if name in WHOLE]):
            raise ConfigError(f"{wrong[0]} is measured with its language model, so it has no part in vision alone")
        if not self.bundle and (wrong := [name for name in self.contestants if name in BUNDLED]):
            raise ConfigError(f"{wrong[0]} is an engine of a bundle, so it needs one: --bundle")

    @property
    def names(self) -> tuple[str, ...]:
        """Who takes part: those asked for, else everybody who can."""
        absent = (*(() if self.bundle else BUNDLED), *(WHOLE if self.vision_only else ()))
        return self.contestants or tuple(name for name in CONTESTANTS if name not in absent)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"contestants": list(self.contestants)}


def check_contestants(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once. Raises ConfigError for one that nobody has."""
    if wrong := [name for name in names if name not in CONTESTANTS]:
        raise ConfigError(f"there is no contestant {wrong[0]!r}, they are {', '.join(CONTESTANTS)}")
    return tuple(dict.fromkeys(names))
