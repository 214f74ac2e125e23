"""What inner merging costs within a prefill, and a later question about the same video, by random weights on a CPU.

    python -m scripts.prefill_cost --width 3584 --tokens 641
    python -m scripts.prefill_cost --width 896 --tokens 641 --layers 14 --inner-layer 9

The first line is of one decoder layer and one merging of a published size. With --layers, that many are run as a model:
a prefill, and two more questions from its keys and values. Times are CPU seconds of one thread, the least of several
turns, so that a busy machine spoils none.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from earlytom.config import InnerMerging
from earlytom.inner import MergeRequest
from earlytom.language.cache import PromptCache
from earlytom.language.conversation import prefill
from earlytom.language.geometry import PUBLISHED
from earlytom.language.prompt import VIDEO_TOKEN, embed_prompt
from earlytom.language.qwen2 import Qwen2
from earlytom.language.score import last_query_attention

TEXT = 10  # tokens of the prompt before the video, and behind it


@dataclass(frozen=True)
class Cost:
    """Seconds of a layer on all tokens, of one on those left, of one merging; its share of a whole prefill's layers."""

    layer: float
    layer_after: float
    merging: float
    share: float


def configuration(width: int, layers: int, small: int = 1) -> Qwen2Config:
    """Of a published width; small: divides the MLP, for tests."""
    sizes = PUBLISHED[width]
    return Qwen2Config(
        vocab_size=1000, hidden_size=width, intermediate_size=sizes.intermediate_size // small,
        num_hidden_layers=layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        attn_implementation="sdpa",
    )


@torch.no_grad()
def merging_cost(width: int, tokens: int, inner: InnerMerging, *, turns: int, small: int = 1) -> Cost:
    """Of a prompt with so many visual tokens."""
    layers, config = PUBLISHED[width].layers, configuration(width, 1, small)
    torch.manual_seed(0)
    layer, rotary = Qwen2DecoderLayer(config, 0).eval(), Qwen2RotaryEmbedding(config)
    request = MergeRequest(inner, (((TEXT, tokens),),))
    total = tokens + 2 * TEXT
    hidden, positions = torch.randn(1, total, width), torch.arange(total)[None]
    left = request.unpadded_width(total)
    cache = DynamicCache(config=config)
    turning = rotary(hidden, positions)
    layer(hidden, position_embeddings=turning, past_key_values=cache)

    def merge() -> None:
        score = last_query_attention(layer, hidden, turning, keys=cache.layers[0].keys)
        merged, places = request.merge(hidden, score, positions, left)
        rotary(merged, places)

    def run(count: int) -> Callable[[], object]:
        part = tuple(x[:, :count] for x in turning)
        return lambda: layer(hidden[:, :count], position_embeddings=part)

    works = (run(total), run(left), merge)
    rounds = [[_seconds(work) for work in works] for _ in range(turns)]  # alternating
    whole, after, merging = (min(times) for times in zip(*rounds))
    rest = whole * inner.layer + after * (layers - inner.layer)
    return Cost(whole, after, merging, merging / (rest + merging))


def question_costs(width: int, tokens: int, inner: InnerMerging | None, layers: int, small: int = 1) -> list[float]:
    """Seconds of the prefills of three questions about one video."""
    config = configuration(width, layers, small)
    torch.manual_seed(0)
    model = Qwen2(config).eval()
    video, cache, found = torch.randn(tokens, width), PromptCache(config=config), []
    for question in range(3):
        ids = [*range(TEXT), VIDEO_TOKEN, *range(100 * (question + 1), 100 * (question + 1) + TEXT)]
        with torch.no_grad():
            embeds, span = embed_prompt(model, ids, video)
        found.append(_seconds(partial(prefill, model, embeds, span, inner, cache)))
        cache.rewind(sum(span))
    return found


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser("prefill_cost", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--width", type=int, choices=sorted(PUBLISHED), default=896, help="of the LLM: 0.5B, 7B, 72B")
    made.add_argument("--tokens", type=int, default=641, help="visual tokens")
    made.add_argument("--inner-layer", type=int, default=18)
    made.add_argument("--inner-ratio", type=float, default=0.5)
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--layers", type=int, help="ask three questions of a model of so many layers instead")
    given = made.parse_args(argv)
    torch.set_num_threads(1)
    inner = InnerMerging(given.inner_layer, given.inner_ratio)
    if given.layers is None:
        cost = merging_cost(given.width, given.tokens, inner, turns=given.turns)
        print(
            f"width {given.width}, {given.tokens} visual tokens: a layer {cost.layer * 1e3:.1f} ms, after merging "
            f"{cost.layer_after * 1e3:.1f} ms, merging {cost.merging * 1e3:.2f} ms, {cost.share:.2%} of the prefill"
        )
        return 0
    for chosen in (None, inner, InnerMerging(inner.layer, inner.ratio, "dpc-knn")):
        first, *later = question_costs(given.width, given.tokens, chosen, given.layers)
        print(
            f"width {given.width}, {given.layers} layers, {given.tokens} visual tokens, inner merging "
            f"{chosen.method if chosen else 'none'}: first prefill {first:.2f} s, later {min(later):.3f} s, "
            f"{first / min(later):.1f} x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
