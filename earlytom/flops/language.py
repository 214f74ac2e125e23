"""FLOPs of the language model: what PyTorch's FlopCounterMode counts of our Qwen2, from sizes alone.

Two conventions for causal attention. **Full**, the default: every query with every key, N^2 pairs, as FlopCounterMode
counts and as a kernel computes that masks afterwards. **Causal** (`causal=True`): only the N(N + 1)/2 pairs that the
mask lets through, the least that any kernel must do. Decoding has no such choice: its query sees every key.

A multiply and an add are two FLOPs, and matrix products alone count: norms, the rotary embedding, softmax, SiLU, the
weighted sum of inner merging (2nD) and the distances of DPC-KNN do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import InnerMerging
from ..errors import ConfigError
from ..language.geometry import LanguageGeometry


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one pass through the LLM, by part.

    projections: queries, keys, values and outputs; attention: scores and values; mlp: gate, up and down; merging: inner
    merging's scores and similarities; head: logits of the last token of each sample, as `generate` asks for them.
    """

    projections: int
    attention: int
    mlp: int
    merging: int
    head: int

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.mlp + self.merging + self.head


@dataclass(frozen=True)
class Prompt:
    """What one sample's prefill is given: text tokens and, among them, one video's visual tokens, newlines included.

    inner: merging inside the LLM, or None. Each of a batch is such a prompt.
    """

    text: int
    visual: int
    inner: InnerMerging | None = None

    def __post_init__(self) -> None:
        if self.text < 0 or self.visual < 0 or not self.tokens:
            raise ConfigError(
                f"a prompt of {self.text} text and {self.visual} visual tokens cannot be: it has at least one token"
            )

    @property
    def tokens(self) -> int:
        """N, of the layers below the one before which is merged."""
        return self.text + self.visual

    @property
    def removed(self) -> int:
        return self.inner.removed(self.visual) if self.inner else 0

    def by_layer(self, geometry: LanguageGeometry) -> tuple[tuple[int, int], ...]:
        """(layers, tokens that each of them sees and caches). Raises ConfigError on a layer that does not exist."""
        if self.inner is None or not self.removed:
            return ((geometry.layers, self.tokens),)
        k = self.inner.layer
        if k >= geometry.layers:
            raise ConfigError(
                f"inner merging before layer {k} cannot be: the LLM has {geometry.layers} layers, so the layer must "
                f"lie in 1..{geometry.layers - 1}"
            )
        return ((k, self.tokens), (geometry.layers - k, self.tokens - self.removed))


def language_prefill(
    geometry: LanguageGeometry, prompt: Prompt, *, batch: int = 1, causal: bool = False
) -> PassFlops:
    """FLOPs of the prefill of `batch` such prompts, up to the first token's logits. Raises ConfigError."""
    found = [
        _layers(geometry, count, n, n * (n + 1) // 2 if causal else n * n) for count, n in prompt.by_layer(geometry)
    ]
    return _summed(found, _merging(geometry, prompt), 2 * geometry.hidden_size * geometry.vocabulary, batch)


def language_decode(
    geometry: LanguageGeometry, prompt: Prompt, *, generated: int = 0, batch: int = 1
) -> PassFlops:
    """FLOPs of one decode step of `batch` samples, with `generated` tokens in the cache behind the prompt's."""
    found = [_layers(geometry, count, 1, n + generated + 1) for count, n in prompt.by_layer(geometry)]
    return _summed(found, 0, 2 * geometry.hidden_size * geometry.vocabulary, batch)


def cached_tokens(geometry: LanguageGeometry, prompt: Prompt) -> int:
    """Tokens whose keys and values the cache holds after the prefill of one sample, summed over the layers."""
    return sum(count * n for count, n in prompt.by_layer(geometry))


def layer_weight_count(geometry: LanguageGeometry) -> int:
    """Numbers in the weights of one decoder layer."""
    d, q, kv = geometry.hidden_size, geometry.query_size, geometry.kv_size
    return (d + 1) * (q + 2 * kv) + q * d + 3 * d * geometry.intermediate_size + 2 * d


def language_weight_count(geometry: LanguageGeometry) -> int:
    """Numbers in the LLM's weights, a tied head counted once."""
    matrices = 1 if geometry.tied else 2
    return (
        geometry.layers * layer_weight_count(geometry)
        + geometry.hidden_size
        + matrices * geometry.vocabulary * geometry.hidden_size
    )


def _layers(geometry: LanguageGeometry, count: int, queries: int, pairs: int) -> tuple[int, int, int]:
    """Projections, attention and MLP of `count` layers on `queries` tokens; pairs of query and key in each head."""
    d, q, kv = geometry.hidden_size, geometry.query_size, geometry.kv_size
    return (
        count * 2 * queries * d * (2 * q + 2 * kv),
        count * 4 * pairs * q,  # query heads all count, however few keys they share
        count * 6 * queries * d * geometry.intermediate_size,
    )


def _merging(geometry: LanguageGeometry, prompt: Prompt) -> int:
    """Of one sample: scores of the keys just cached as in `last_query_attention`, similarities as in `attention_plan`;
    or DPC-KNN's means."""
    if prompt.inner is None or not prompt.removed:
        return 0
    d, q = geometry.hidden_size, geometry.query_size
    kept = prompt.visual - prompt.removed
    if prompt.inner.method == "dpc-knn":
        return 2 * kept * prompt.visual * d
    return 2 * prompt.tokens * q + 2 * d * q + 2 * prompt.removed * kept * d


def _summed(layers: list[tuple[int, int, int]], merging: int, head: int, batch: int) -> PassFlops:
    projections, attention, mlp = (batch * sum(part) for part in zip(*layers))
    return PassFlops(projections, attention, mlp, batch * merging, batch * head)
