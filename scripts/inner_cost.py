"""What inner merging costs within a prefill: one decoder layer and one merging, of random weights and published sizes.

    python -m scripts.inner_cost --width 3584 --tokens 641

Times are CPU seconds of one thread, the least of several turns that alternate, so that a busy machine spoils none.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from earlytom.config import InnerMerging
from earlytom.flops import QWEN2_SIZES
from earlytom.inner import MergeRequest
from earlytom.language.qwen2 import last_query_attention

HEADS = {896: (14, 2), 3584: (28, 4), 8192: (64, 8)}  # of queries, of keys and values
TEXT = 20  # tokens of the prompt beside the video


@dataclass(frozen=True)
class Cost:
    """Seconds of a layer on all tokens, of one on those left, of one merging; its share of a whole prefill's layers."""

    layer: float
    layer_after: float
    merging: float
    share: float


@torch.no_grad()
def measure(width: int, tokens: int, inner: InnerMerging, *, turns: int = 5, small: int = 1) -> Cost:
    """tokens: visual ones; small: divides the MLP, for tests."""
    layers, intermediate = QWEN2_SIZES[width]
    heads, groups = HEADS[width]
    config = Qwen2Config(
        hidden_size=width, intermediate_size=intermediate // small, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    layer, rotary = Qwen2DecoderLayer(config, 0).eval(), Qwen2RotaryEmbedding(config)
    request = MergeRequest(inner, (((TEXT // 2, tokens),),))
    total = tokens + TEXT
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

    least = [float("inf")] * 3
    for _ in range(turns):
        for index, work in enumerate((run(total), run(left), merge)):
            start = time.process_time()
            work()
            least[index] = min(least[index], time.process_time() - start)
    whole, after, merging = least
    rest = whole * inner.layer + after * (layers - inner.layer)
    return Cost(whole, after, merging, merging / (rest + merging))


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser("inner_cost", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--width", type=int, choices=sorted(HEADS), default=896, help="of the LLM: 0.5B, 7B, 72B")
    made.add_argument("--tokens", type=int, default=641, help="visual tokens")
    made.add_argument("--layer", type=int, default=18)
    made.add_argument("--ratio", type=float, default=0.5)
    made.add_argument("--turns", type=int, default=5)
    given = made.parse_args(argv)
    torch.set_num_threads(1)
    cost = measure(given.width, given.tokens, InnerMerging(given.layer, given.ratio), turns=given.turns)
    print(
        f"width {given.width}, {given.tokens} visual tokens and {TEXT} of text: a layer {cost.layer * 1e3:.1f} ms, "
        f"after merging {cost.layer_after * 1e3:.1f} ms, merging {cost.merging * 1e3:.2f} ms, "
        f"{cost.share:.2%} of the layers"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
