"""The colours of scores, the same as in the report: equal steps from pale mint to black; warm below zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

COOL = ("#def5e5", "#a0dfb9", "#54c9ad", "#38aaac", "#348aa6", "#366a9f", "#40498e", "#3b2f5e", "#28192f")
WARM = ("#ecece8", "#e9b98a", "#cf7a45", "#9c3f2c", "#5a1a20")
SIGNED = (*reversed(WARM), *COOL[2::2])
"""As many steps to each side of zero, which is the palest."""
NOTHING = "#f1f1ed"
"""Where there is no head, or no score."""


def limits(values: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """The ends of the scale: from 0, or from the lowest score where 0 is far away; around 0 where both signs occur."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if low < 0 < high:
        reach = max(-low, high)
        return -reach, reach
    if low >= 0:
        low = low if low > high / 2 else 0.0
    else:
        high = high if high < low / 2 else 0.0
    return low, high if high > low else low + 1


def painted(values: Float[np.ndarray, "*grid"]) -> UInt8[np.ndarray, "*grid 3"]:
    """Every score as red, green and blue."""
    low, high = limits(values)
    stops = np.array([rgb(stop) for stop in (SIGNED if low < 0 < high else COOL)])
    share = (np.nan_to_num(values, nan=low) - low) / (high - low)
    places = np.linspace(0, 1, len(stops))
    found = np.stack([np.interp(share, places, stops[:, channel]) for channel in range(3)], axis=-1)
    found[~np.isfinite(values)] = rgb(NOTHING)
    return found.round().astype(np.uint8)


def rgb(text: str) -> Sequence[int]:
    return [int(text[place : place + 2], 16) for place in (1, 3, 5)]
