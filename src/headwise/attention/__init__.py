"""The core: one attention call, declared, read, edited, and lowered to the cheapest exact path."""

from headwise.attention.edits import Blend, Edit, HeadGain, KeyRule, Rebase, Reweight, ScoreBias, ScoreMap, Shift
from headwise.attention.engine import force_path
from headwise.attention.readings import (
    At,
    Distance,
    Entropy,
    HeadOutput,
    Inputs,
    LogSumExp,
    Map,
    Mass,
    Propagate,
    Reading,
    Received,
    Scores,
    SegmentEntropy,
    Top,
)
from headwise.attention.run import Run, SiteReport, attend, probe

__all__ = [
    "At",
    "Blend",
    "Distance",
    "Edit",
    "Entropy",
    "HeadGain",
    "HeadOutput",
    "Inputs",
    "KeyRule",
    "LogSumExp",
    "Map",
    "Mass",
    "Propagate",
    "Reading",
    "Rebase",
    "Received",
    "Reweight",
    "Run",
    "ScoreBias",
    "ScoreMap",
    "Scores",
    "SegmentEntropy",
    "Shift",
    "SiteReport",
    "Top",
    "attend",
    "force_path",
    "probe",
]
