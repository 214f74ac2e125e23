"""The least time that work takes on a card, and the table of cards."""

from __future__ import annotations

import pytest

from earlytom.errors import ConfigError
from earlytom.flops import Work
from engines.cards import CARDS, card_key
from engines.rates import RATES, Rates, find_rates, floor

CARD = Rates("a card", fp32=10, tf32=None, half=100, bandwidth=1000, source="", bf16=False)


def test_the_larger_of_work_and_bytes_is_the_floor() -> None:
    busy = Work(3 * 10**14, masked_flops=10**14, weight_bytes=10**9, cache_bytes=0, activation_bytes=10**15)
    least = floor(busy, CARD, "fp16")
    assert (least.seconds, least.bound) == (2.0, "FLOPs")  # neither what the mask hides nor activations
    assert floor(busy, CARD, "fp32").seconds == 20.0
    idle = Work(10**9, masked_flops=0, weight_bytes=10**12, cache_bytes=2 * 10**12, activation_bytes=0)
    assert (floor(idle, CARD, "fp16").seconds, floor(idle, CARD, "fp16").bound) == (3.0, "bytes")


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_a_type_that_the_card_lacks_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"a card has no matrix products in {kind}"):
        floor(Work(1, 0, 1, 0, 0), CARD, kind)


def test_cards_are_found_by_the_names_that_engines_are_built_for() -> None:
    assert set(RATES) <= set(CARDS) and all(card_key(name) == name for name in RATES)
    found, missing = find_rates("NVIDIA A100, a100-80gb,sm80,A100 40GB,,rtx-4090,voodoo2")
    assert [rates.title for rates in found] == ["A100 80 GB SXM", "A100 40 GB", "GeForce RTX 4090"]
    assert missing == ("sm80", "voodoo2")


def test_figures_are_dense_and_in_order() -> None:
    """A tensor core is 2 to 16 times as fast in half precision as a card without it in float32; TF32 lies between."""
    for rates in RATES.values():
        assert 1.5 <= rates.half / rates.fp32 <= 17 and 250 < rates.bandwidth < 8000 and rates.source
        assert rates.tf32 is None or rates.fp32 <= rates.tf32 <= rates.half / 1.9
    assert RATES["h200"].half == RATES["h100"].half and RATES["a10040gb"].bandwidth < RATES["a100"].bandwidth
