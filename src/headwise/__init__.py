"""headwise: scan, trace, steer, swap, slim and study the attention heads of any model.

At the top stand `open_model`, `attend`, `probe`, `Segments`, and the readings and edits; the rooms are modules:
`headwise.scan`, `headwise.study`, ...
"""

import importlib
from typing import Any

from headwise.attention import (
    At,
    Blend,
    Distance,
    Entropy,
    HeadGain,
    HeadOutput,
    Inputs,
    LogSumExp,
    Map,
    Mass,
    Propagate,
    Rebase,
    Received,
    Reweight,
    ScoreBias,
    ScoreMap,
    Scores,
    SegmentEntropy,
    Shift,
    Top,
    attend,
    probe,
)
from headwise.errors import HeadwiseError
from headwise.models import Segments
from headwise.paper import Paper

__version__ = "0.1.0"

__all__ = [
    "At",
    "Blend",
    "Distance",
    "Entropy",
    "HeadGain",
    "HeadOutput",
    "HeadwiseError",
    "Inputs",
    "LogSumExp",
    "Map",
    "Mass",
    "Paper",
    "Propagate",
    "Rebase",
    "Received",
    "Reweight",
    "ScoreBias",
    "ScoreMap",
    "Scores",
    "SegmentEntropy",
    "Segments",
    "Shift",
    "Top",
    "attend",
    "open_model",
    "probe",
]

LAZY = {"open_model": "headwise.models.open", "scan": None, "study": None, "studio": None}
"""Loaded when first asked for: they bring transformers' model classes, pandas or a server with them."""


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    home = LAZY[name]
    if home is None:
        return importlib.import_module(f"headwise.{name}")
    return getattr(importlib.import_module(home), name)
