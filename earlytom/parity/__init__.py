"""How far two backends agree on a clip: their choices first, their numbers where the choices agree, then a verdict."""

from .agreement import Agreement, PlanAgreement, ScoreErrors, agree, match_frames, score_errors
from .flips import Flip, sources
from .numbers import Aligned, Difference, Hop, align, compare, measure
from .oracle import OracleHop, oracle_hop, oracle_trace
from .results import HopReport, ParityReport
from .traces import VideoTrace, split_trace
from .verdict import TOLERANCES, Tolerance, Verdict, bisect, judge

__all__ = [
    "TOLERANCES", "Agreement", "Aligned", "Difference", "Flip", "Hop", "HopReport", "OracleHop", "ParityReport",
    "PlanAgreement", "ScoreErrors", "Tolerance", "Verdict", "VideoTrace", "agree", "align", "bisect", "compare",
    "judge", "match_frames", "measure", "oracle_hop", "oracle_trace", "score_errors", "sources", "split_trace",
]  # fmt: skip
