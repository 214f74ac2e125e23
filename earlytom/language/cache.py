"""The key/value cache of a prompt that others may continue: it goes back to what stands before the question."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache, DynamicCache

from ..errors import InputError


class PromptCache(DynamicCache):
    """The DynamicCache of one prompt that can be rewound to its first tokens, inner merging or not.

    Without merging their keys and values are all that a later prompt with the same beginning needs. With the method
    `dpc-knn` it is the same, with fewer tokens from layer k on, which merging comes before. The method `attention`
    looks at the question, so from k on nothing of them holds for another one. But no token below k has seen a later
    one: keys and values of layers 0..k-1 stay, and so do the hidden states that enter k.
    """

    layer: int | None = None  # k, once something was merged
    removed: int = 0  # tokens that were merged away
    entering: tuple[Tensor, Tensor] | None = None  # hidden states [1, N, D] that enter k, their positions [1, N]

    def note_merging(self, layer: int, removed: int, entering: tuple[Tensor, Tensor] | None) -> None:
        """Remember a merging; entering: what came into it, if it looked at more than the video."""
        self.layer, self.removed, self.entering = layer, removed, entering

    def rewind(self, tokens: int) -> None:
        """Back to the first `tokens` tokens, as if no others had come. Raises InputError when there are fewer."""
        if self.get_seq_length() < tokens:
            raise InputError(f"the cache holds {self.get_seq_length()} tokens, it cannot go back to {tokens}")
        for index, layer in enumerate(self.layers):
            merged = self.layer is not None and index >= self.layer
            if merged and self.entering is not None:
                layer.reset()
            else:
                layer.crop(tokens - (self.removed if merged else 0) - layer.get_seq_length())
        if self.entering is not None:
            hidden, positions = self.entering
            self.entering = hidden[:, :tokens], positions[:, :tokens]


def held_states(cache: Cache | None, tokens: int) -> tuple[Tensor, Tensor]:
    """What a rewound PromptCache holds: hidden states [1, tokens, D], positions [1, tokens]. Raises InputError."""
    held = cache.entering if isinstance(cache, PromptCache) else None
    if held is None or held[0].shape[1] != tokens:
        raise InputError(
            f"the cache holds {tokens} tokens below the layer that inner merging comes before and none from it on: "
            "only a PromptCache that was rewound can be continued so"
        )
    return held
