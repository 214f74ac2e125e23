"""Sizes of the language model, Qwen2, without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class LanguageGeometry:
    """Sizes of a Qwen2: decoder layers, width, query and key/value heads of head_dim, width of the MLP, vocabulary.

    tied: the output head is the embedding's matrix. Raises ConfigError on sizes that do not fit each other.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary: int
    tied: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "tied" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"language geometry: {name} is {value!r}, it must be a whole number of at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"language geometry: {self.heads} heads do not share {self.kv_heads} key/value heads evenly"
            )

    @property
    def query_size(self) -> int:
        """Width of all queries of a token, and of what attention gives back."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys of a token, and of all its values."""
        return self.kv_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What LLaVA-OneVision and LLaVA-Video come with, by their published config.json: the width tells which one it is.
PUBLISHED = {
    geometry.hidden_size: geometry
    for geometry in (
        LanguageGeometry(24, 896, 14, 2, 64, 4864, 151936, tied=True),  # Qwen2-0.5B
        LanguageGeometry(28, 3584, 28, 4, 128, 18944, 152064),  # Qwen2-7B
        LanguageGeometry(80, 8192, 64, 8, 128, 29568, 152064),  # Qwen2-72B
    )
}
