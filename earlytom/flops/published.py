"""The FLOPs formula of the paper's code, as it is: for comparing with published figures, not for planning a card."""

from __future__ import annotations

from ..config import EarlyTomConfig


def prefill_flops(
    tokens: int, width: int, intermediate: int, layers: int, *, config: EarlyTomConfig | None = None
) -> int:
    """FLOPs of `layers` transformer layers over `tokens` tokens: 4nd^2 + 2n^2d + 2ndm for each layer.

    That is `flops.py` of the paper's code, in which a multiply-add is one FLOP, the MLP has two products, and keys are
    as wide as queries. config: whose inner merging leaves fewer tokens from its layer on. docs/performance.md says
    which published figures it gives.
    """

    def layer(n: int) -> int:
        return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * intermediate

    inner = config.inner if config is not None else None
    if inner is None or inner.layer >= layers:
        return layers * layer(tokens)
    return inner.layer * layer(tokens) + (layers - inner.layer) * layer(tokens - inner.removed(tokens))
