"""Rotary bases whose waveforms fill each other's troughs, for `AttentionBuckets`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from headwise.attention.waveform import ripples, rope_peaks, rope_waveform
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.steer.attention_buckets import text_rotary

CANDIDATES = tuple(round(1 + 0.05 * n, 2) for n in range(37))
"""1 to 2.8: the paper's range of bases, as multiples of its models' own."""


def choose_buckets(
    opened: Opened, n: int = 6, candidates: Sequence[float] = CANDIDATES, span: int = 2048
) -> tuple[float, ...]:
    """`ratios` whose waveforms fill each other's troughs over distances 1 to `span`.

    Greedy: the model's own base first, then again and again the candidate whose peaks lie nearest to the troughs of the
    envelope `E(s) = max_b W_b(s)` of those chosen (the sum over the troughs), envelope and waveforms without their
    trends. How exactly the paper searches is not known; this is its intent."""
    rotary = text_rotary(opened)
    if rotary is None:
        raise HeadwiseError(f"choose_buckets needs a model with rotary positions; {opened.name} has none.")
    if not all(isinstance(ratio, int | float) and 0 < ratio < float("inf") for ratio in candidates):
        raise HeadwiseError(f"choose_buckets wants candidates= above 0; got {tuple(candidates)!r}.")
    others = [ratio for ratio in candidates if ratio != 1]
    if not 1 <= n <= len(others) + 1 or span < 16:
        raise HeadwiseError(
            f"choose_buckets wants n= of 1 to {len(others) + 1}, one more than there are candidates, and span= of at "
            f"least 16; got n={n}, span={span}."
        )
    ratios = [1.0, *others]
    frequencies = [rotary.frequencies(ratio * rotary.base).double().cpu().numpy() for ratio in ratios]
    chosen = complementary(np.stack([rope_waveform(f, span)[1:] for f in frequencies]), n)
    return tuple(float(ratios[k]) for k in chosen)


def complementary(waves: Float[np.ndarray, "candidate distance"], n: int) -> list[int]:
    """The numbers of `n` waveforms that fill each other's troughs, beginning with the first."""
    peaks = [rope_peaks(wave)[0] for wave in ripples(waves)]
    chosen = [0]
    while len(chosen) < n:
        _, troughs = rope_peaks(ripples(waves[chosen].max(0)))
        apart = {
            k: np.abs(troughs[:, None] - near).min(1).sum() if len(near) else np.inf
            for k, near in enumerate(peaks)
            if k not in chosen
        }
        chosen.append(min(apart, key=lambda k: apart[k]))
    return chosen
