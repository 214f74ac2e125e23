"""How far two backends agree on a clip: their choices first, their numbers where the choices agree, then a verdict.

What needs torch is imported when it is first used: a manifest, which holds results only, is free of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .results import Hop, HopReport, ParityReport
from .verdict import TOLERANCES, Tolerance, judge

if TYPE_CHECKING:
    from .agreement import ScoreErrors, agree, match_frames, score_errors
    from .flips import sources
    from .numbers import align, compare, measure
    from .oracle import oracle_hop, oracle_trace
    from .traces import VideoTrace, split_trace

__all__ = [
    "TOLERANCES", "Hop", "HopReport", "ParityReport", "ScoreErrors", "Tolerance", "VideoTrace", "agree", "align",
    "compare", "judge", "match_frames", "measure", "oracle_hop", "oracle_trace", "score_errors", "sources",
    "split_trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home in ("agreement", "flips", "numbers", "oracle", "traces") if name in __all__ else ():
        module = import_module(f".{home}", __name__)
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
