"""The core: one attention call, declared, read, edited, and lowered to the cheapest exact path."""

from headwise.attention.edits import Blend, Edit, HeadGain, Rebase, Reweight, ScoreBias, ScoreMap, Shift
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

READINGS = (
    "At Distance Entropy HeadOutput Inputs LogSumExp Map Mass Propagate Received Scores SegmentEntropy Top".split()
)
EDITS = "Blend HeadGain Rebase Reweight ScoreBias ScoreMap Shift".split()

__all__ = [  # noqa: PLE0604
    *READINGS,
    *EDITS,
    "Edit",
    "Reading",
    "Run",
    "SiteReport",
    "attend",
    "force_path",
    "probe",
]
