"""headwise: scan, trace, steer, swap, slim and study the attention heads of any model.

At the top stand `open_model`, `attend`, `probe`, `Segments`, and the readings and edits; the rooms are modules:
`headwise.scan`, `headwise.steer`, `headwise.study`, ... All is loaded when first asked for, so that `headwise --help`
need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headwise.errors import HeadwiseError
from headwise.paper import Paper

if TYPE_CHECKING:
    from headwise import attention, models, patterns, scan, steer, studio, study
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
        Recompute,
        Recomputed,
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
    from headwise.models import Segments, open_model
    from headwise.patterns import HeadPattern

__version__ = "0.1.0"

__all__ = [
    "At",
    "Blend",
    "Distance",
    "Entropy",
    "HeadGain",
    "HeadOutput",
    "HeadPattern",
    "HeadwiseError",
    "Inputs",
    "LogSumExp",
    "Map",
    "Mass",
    "Paper",
    "Propagate",
    "Rebase",
    "Received",
    "Recompute",
    "Recomputed",
    "Reweight",
    "ScoreBias",
    "ScoreMap",
    "Scores",
    "SegmentEntropy",
    "Segments",
    "Shift",
    "Top",
    "attend",
    "attention",
    "models",
    "open_model",
    "patterns",
    "probe",
    "scan",
    "steer",
    "studio",
    "study",
]

HOMES = {
    "HeadPattern": "headwise.patterns",
    "Segments": "headwise.models.segments",
    "open_model": "headwise.models.open",
}
"""Where a name is that is neither a module nor in `headwise.attention`."""
MODULES = ("attention", "models", "patterns", "scan", "steer", "studio", "study")


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f"headwise.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(HOMES.get(name, "headwise.attention")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
