"""How far two backends agree on a clip: their choices first, their numbers where the choices agree, then a verdict.

What needs torch is imported when it is first used: a manifest, which holds results only, is free of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

_HOMES = {
    name: home
    for home, names in {
        "agreement": "ScoreErrors agree match_frames score_errors",
        "answers": "AnswerAgreement Divergence",
        "asking": "compare_answers",
        "flips": "sources",
        "numbers": "align compare measure",
        "oracle": "oracle_hop oracle_trace",
        "results": "Hop HopReport ParityReport",
        "traces": "VideoTrace split_trace",
        "verdict": "TOLERANCES Tolerance judge judge_answers logits_limit parting",
    }.items()
    for name in names.split()
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from .agreement import ScoreErrors, agree, match_frames, score_errors
    from .answers import AnswerAgreement, Divergence
    from .asking import compare_answers
    from .flips import sources
    from .numbers import align, compare, measure
    from .oracle import oracle_hop, oracle_trace
    from .results import Hop, HopReport, ParityReport
    from .traces import VideoTrace, split_trace
    from .verdict import TOLERANCES, Tolerance, judge, judge_answers, logits_limit, parting

__getattr__ = lazy_names(__name__, _HOMES)
