"""How fast cards can be at best, by their makers' figures, and the time that a piece of work takes at least on one.

Rates are NVIDIA's, of matrix products without sparsity: where a datasheet gives "with sparsity" alone, half of it. On
GeForce cards half-precision products accumulate in float32, as PyTorch's do; in float16 they would run at twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from earlytom.errors import ConfigError
from earlytom.flops import Work

from .cards import card_key


@dataclass(frozen=True)
class Rates:
    """A card's peak figures, dense, in TFLOP/s, None for a type that it does not multiply; bandwidth in GB/s.

    fp32: outside the tensor cores, as our engines and PyTorch by default compute float32; tf32: what allowing TF32
    would give; half: fp16 and, but for Turing, bf16. source: NVIDIA's document.
    """

    title: str
    fp32: float
    tf32: float | None
    half: float
    bandwidth: float
    source: str
    bf16: bool = True

    def matrix_rate(self, kind: str) -> float | None:
        """FLOP/s in "fp32", "tf32", "fp16" or "bf16", or None where the card has no such products."""
        if kind == "bf16" and not self.bf16:
            return None
        rate = {"fp32": self.fp32, "tf32": self.tf32, "fp16": self.half, "bf16": self.half}[kind]
        return None if rate is None else rate * 1e12


_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet, halved from with sparsity"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet, halved from with sparsity"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, V2"

_A100_SXM = Rates("A100 80 GB SXM", 19.5, 156, 312, 2039, _A100)

# By the names of cards.py. Which variant a bare name means is in the title.
RATES = {
    "a100": _A100_SXM,
    "a10080gb": _A100_SXM,
    "a10080gbpcie": Rates("A100 80 GB PCIe", 19.5, 156, 312, 1935, _A100),
    "a10040gb": Rates("A100 40 GB", 19.5, 156, 312, 1555, _A100),
    "a30": Rates("A30", 10.3, 82, 165, 933, "NVIDIA A30 Tensor Core GPU datasheet"),
    "a10": Rates("A10", 31.2, 62.5, 125, 600, "NVIDIA A10 Tensor Core GPU datasheet"),
    "a10g": Rates("A10G", 35, 35, 70, 600, "NVIDIA A10G datasheet for AWS"),
    "h100": Rates("H100 SXM", 67, 494.5, 989.5, 3350, _H100),
    "h100pcie": Rates("H100 PCIe", 51, 378, 756.5, 2000, _H100),
    "h200": Rates("H200 SXM", 67, 494.5, 989.5, 4800, _H200),
    "l4": Rates("L4", 30.3, 60, 121, 300, "NVIDIA L4 Tensor Core GPU datasheet, halved from with sparsity"),
    "l40": Rates("L40", 90.5, 90.5, 181.05, 864, "NVIDIA L40 GPU datasheet"),
    "l40s": Rates("L40S", 91.6, 183, 362.05, 864, "NVIDIA L40S GPU datasheet"),
    "rtx3090": Rates("GeForce RTX 3090", 35.6, 35.6, 71, 936, "NVIDIA Ampere GA102 GPU Architecture whitepaper, V2"),
    "rtx4090": Rates("GeForce RTX 4090", 82.6, 82.6, 165.2, 1008, _ADA),
    "t4": Rates("T4", 8.1, None, 65, 320, "NVIDIA Turing GPU Architecture whitepaper", bf16=False),
}


@dataclass(frozen=True)
class Floor:
    """The least seconds that work takes on a card, and what bounds it: "FLOPs" or "bytes"."""

    seconds: float
    bound: str


def floor(work: Work, rates: Rates, kind: str) -> Floor:
    """FLOPs over the card's matrix rate in `kind`, or, if that is more, the bytes that must move over the bandwidth.

    kind: a dtype's name, or "tf32". Left out is what a kernel may save: attention that a causal mask hides, and
    activations, which the chip may hold. Raises ConfigError when the card has no products in that type.
    """
    rate = rates.matrix_rate(kind)
    if rate is None:
        raise ConfigError(f"the {rates.title} has no matrix products in {kind}")
    computing, moving = work.least_flops / rate, work.least_bytes / (rates.bandwidth * 1e9)
    return Floor(computing, "FLOPs") if computing >= moving else Floor(moving, "bytes")


def find_rates(cards: str) -> tuple[tuple[Rates, ...], tuple[str, ...]]:
    """"a100,rtx4090" -> the rates of those that are in the table, each once, and the names that are not."""
    names = [part.strip() for part in cards.split(",") if part.strip()]
    keys = {name: card_key(name) for name in names}
    found = dict.fromkeys(RATES[key] for key in keys.values() if key in RATES)
    return tuple(found), tuple(name for name, key in keys.items() if key not in RATES)
