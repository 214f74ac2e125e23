"""How far two backends agree on a clip: their choices first, their numbers where the choices agree, then a verdict."""

from .agreement import Agreement, PlanAgreement, ScoreErrors, agree, match_frames, score_errors
from .flips import Flip, sources
from .numbers import TOLERANCES, Aligned, Difference, Hop, Tolerance, Verdict, align, bisect, compare, judge, measure
from .results import HopReport, ParityReport
from .traces import VideoTrace, oracle_trace, split_trace

__all__ = [
    "TOLERANCES", "Agreement", "Aligned", "Difference", "Flip", "Hop", "HopReport", "ParityReport", "PlanAgreement",
    "ScoreErrors", "Tolerance", "Verdict", "VideoTrace", "agree", "align", "bisect", "compare", "judge", "match_frames",
    "measure", "oracle_trace", "score_errors", "sources", "split_trace",
]  # fmt: skip
