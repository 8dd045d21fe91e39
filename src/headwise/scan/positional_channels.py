"""Which channels of the residual stream carry the position of a token, whatever the token is?

The causal mask writes position into a few channels: averaged over random texts, their value rises or falls all along
the sequence. Search: (1) the mean of what every block writes out, over random token sequences without BOS; (2) a
channel is monotonic in a layer if the cubic polynomial fitted to it from position 300 on only rises, or only falls; the
larger of the two groups of layers (2 to the last but one) counts; (3) channels with more than a quarter of the layers
remain; (4) of these the smoothest are kept: smallest sum of squared second differences, from position 200 on, after
scaling to [0, 1] and a Savitzky-Golay filter, in their smoothest monotonic layer.

Paper: Mitigate Position Bias in Large Language Models via Scaling a Single Dimension, arXiv 2406.02536.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention.hidden import hidden
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import quiet
from headwise.scan.tokens import random_tokens

WINDOW, ORDER = 10, 3
"""Of the Savitzky-Golay filter."""
MIDDLE = (10 / 32, 25 / 32)
"""The layers the paper scales in a model of 32, as shares of the depth."""


@dataclass(frozen=True, eq=False)
class PositionalChannels:
    """`channels`: the candidates, smoothest first. `layers`: the first and last layer to scale them in, the paper's 10
    to 25 of 32 brought to this depth. `table`: every monotonic channel with channel, layers (how many are monotonic),
    sign (1 rises, -1 falls) and smoothness."""

    channels: tuple[int, ...]
    layers: tuple[int, int]
    table: pd.DataFrame
    paper: ClassVar[Paper] = Paper(
        "Mitigate Position Bias in Large Language Models via Scaling a Single Dimension", "2406.02536"
    )


def positional_channels(
    opened: Opened,
    tokens: Int[Tensor, "sample token"] | None = None,
    samples: int = 200,
    length: int = 1000,
    skip: int = 300,
    smooth_skip: int = 200,
    degree: int = 3,
    min_layer_share: float = 0.25,
    topk: int = 10,
    seed: int = 0,
    batch: int = 4,
) -> PositionalChannels:
    """The search over `samples` sequences of `length` random tokens, or over `tokens` of your own (without BOS: its
    huge activations would drown the rest). The last two parts of the paper's method, choosing by a validation set and
    scaling the channel, change the model: they are no scan."""
    if tokens is None:
        tokens = random_tokens(opened, samples, length, seed)
    states = mean_states(opened, tokens, batch)
    table = rank_channels(states, skip, smooth_skip, degree, min_layer_share)
    chosen = tuple(int(c) for c in table["channel"].head(topk))
    depth = len(states)
    return PositionalChannels(chosen, (round(MIDDLE[0] * depth), round(MIDDLE[1] * depth)), table)


def mean_states(
    opened: Opened, tokens: Int[Tensor, "sample token"], batch: int = 4
) -> Float[np.ndarray, "layer token channel"]:
    """What every block of the text stream writes out, averaged over the samples."""
    total: dict[int, Tensor] = {}

    def add(layer: int, x: Tensor) -> None:
        total[layer] = total.get(layer, 0.0) + x.detach().double().sum(0)

    with hidden(opened, {"block_out": add}), torch.no_grad():
        for rows in tokens.split(batch):
            opened.model(input_ids=rows.to(opened.device), **quiet(opened.model))
    return (torch.stack([total[layer] for layer in sorted(total)]) / len(tokens)).cpu().numpy()


def rank_channels(
    states: Float[np.ndarray, "layer token channel"],
    skip: int = 300,
    smooth_skip: int = 200,
    degree: int = 3,
    min_layer_share: float = 0.25,
) -> pd.DataFrame:
    """Steps 2 to 4 on mean states: the channels that are monotonic in more than `min_layer_share` of the layers, the
    smoothest first. Needs scipy."""
    layers, length, _ = states.shape
    if length - max(skip, smooth_skip) < 2 * WINDOW or layers < 5:
        raise HeadwiseError(
            f"Wanted states of at least 5 layers and {2 * WINDOW} positions after skip={skip} and "
            f"smooth_skip={smooth_skip}; got {layers} layers and {length} positions."
        )
    inner = np.arange(2, layers - 1)
    sign = np.stack([monotonic(states[layer, skip:], degree) for layer in inner])
    rises, falls = (sign > 0).sum(0), (sign < 0).sum(0)
    direction = np.where(rises > falls, 1, -1)
    count = np.maximum(rises, falls)
    rows = []
    for channel in np.flatnonzero(count > min_layer_share * layers):
        mine = inner[sign[:, channel] == direction[channel]]
        bend = min(roughness(states[layer, smooth_skip:, channel]) for layer in mine)
        rows.append((int(channel), int(count[channel]), int(direction[channel]), bend))
    table = pd.DataFrame(rows, columns=["channel", "layers", "sign", "smoothness"])
    return table.sort_values("smoothness", kind="stable", ignore_index=True)


def monotonic(values: Float[np.ndarray, "token channel"], degree: int = 3) -> Int[np.ndarray, " channel"]:
    """1 where the fitted polynomial never falls, -1 where it never rises, 0 elsewhere and where nothing changes."""
    x = np.linspace(-1, 1, len(values))
    basis = np.polynomial.legendre.legvander(x, degree)
    step = np.diff(basis @ np.linalg.lstsq(basis, values, rcond=None)[0], axis=0)
    moves = np.ptp(values, axis=0) > 0
    return np.where(moves & (step >= 0).all(0), 1, np.where(moves & (step <= 0).all(0), -1, 0))


def roughness(values: Float[np.ndarray, " token"]) -> float:
    """Sum of squared second differences of the values, scaled to [0, 1] and filtered."""
    signal = need("scipy.signal", "analysis")
    scaled = (values - values.min()) / np.ptp(values)
    return float((np.diff(signal.savgol_filter(scaled, WINDOW, ORDER), 2) ** 2).sum())
