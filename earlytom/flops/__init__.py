"""What a model costs, counted from sizes without torch: FLOPs, bytes, before and after EarlyTom.

tower.py and language.py count FLOPs exactly as PyTorch's FlopCounterMode does; work.py adds bytes and puts the parts of
an answer side by side; cost.py is the tower's memory; published.py is the formula of the paper's code.
"""

from __future__ import annotations

from .cost import CallCost, TowerCost, tower_cost, weight_count
from .language import PassFlops, Prompt, cached_tokens, language_decode, language_prefill, language_weight_count
from .published import prefill_flops
from .tower import StageFlops, TowerFlops, tower_flops, unpruned_config
from .work import TEXT_TOKENS, CallWork, ModelWork, Work, model_work

__all__ = [
    "TEXT_TOKENS", "CallCost", "CallWork", "ModelWork", "PassFlops", "Prompt", "StageFlops", "TowerCost", "TowerFlops",
    "Work", "cached_tokens", "language_decode", "language_prefill", "language_weight_count", "model_work",
    "prefill_flops", "tower_cost", "tower_flops", "unpruned_config", "weight_count",
]
