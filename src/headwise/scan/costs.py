"""What a question costs, so that a scan can say how long it takes before it starts.

`assets/costs.json` holds for each question the time it takes on top of plain forward passes over its inputs, as a
multiple of these; `python benchmarks/scan_questions.py` measures it.
"""

from __future__ import annotations

import json
import time
from functools import cache
from importlib.resources import files

import torch

from headwise.models import Opened
from headwise.scan.question import Question

UNKNOWN = {False: 0.5, True: 2.0}
"""For a question nobody has measured: one that reads in the shared pass, one that drives the model itself."""


@cache
def measured() -> dict[str, float]:
    return json.loads((files("headwise.scan") / "assets" / "costs.json").read_text(encoding="utf-8"))


def extra(question: Question) -> float:
    """Time on top of a plain forward pass over the same tokens, as a multiple of it."""
    return measured().get(question.name, UNKNOWN[question.drives])


def plain_seconds(opened: Opened) -> float:
    """A plain forward pass, a token: two operations a parameter at the speed of a matrix product, twice over for
    everything else a forward pass does."""
    return 2 * 2 * sum(p.numel() for p in opened.model.parameters()) / speed(opened.device)


def speed(device: torch.device) -> float:
    """Operations a second of a product of two matrices of 768 x 768: the best of five, as others may be at work."""
    a = torch.randn(768, 768, device=device)
    a @ a
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * 768**3 / min(seconds)
