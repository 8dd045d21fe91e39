"""Models that compute with numbers, one a node: the positional transformer and its standard counterparts, their tasks.

model = PositionalTransformer(1, 1, n=8)
out = model(x, labels=y)        # x, y [batch, n, 1]; .loss the mean squared error
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise import swap
from headwise.errors import HeadwiseError
from headwise.study.hosts import HostOutput

Mode = Literal["positional", "standard", "standard_rope"]
Numbers = Float[Tensor, "row node"]


class PositionalTransformer(nn.Module):
    """`h <- MLP([h; attention(h)])`, `layers` times (floor(log2 n) + 1), without residuals and norms: outputs can grow
    with inputs. One-hot places. Modes ("Positional Attention", arXiv 2410.01686): "positional"; "standard", which is
    given the places beside its input and attends with heads of full width; "standard_rope", which turns queries and
    keys too (the paper's own code rotates them so that it cancels). `extra_nodes`: nodes to compute with, fed zeros and
    not asked for.
    """

    places: Tensor | None

    def __init__(
        self, in_dim: int, out_dim: int, n: int, layers: int | None = None, embed_dim: int = 64, heads: int = 2,
        mlp_hidden: int = 64, extra_nodes: int = 1, mode: Mode = "positional",
    ):  # fmt: skip
        super().__init__()
        if mode not in get_args(Mode):
            raise HeadwiseError(f"mode: one of {', '.join(get_args(Mode))}; got {mode!r}.")
        self.extra, nodes = extra_nodes, n + extra_nodes
        self.register_buffer("places", None if mode == "positional" else torch.eye(nodes))

        def attention() -> nn.Module:
            if mode == "positional":
                return swap.PositionalAttention(embed_dim, heads, length=nodes)
            position = swap.Rope() if mode == "standard_rope" else None
            layer = swap.Attention(
                embed_dim, heads, head_dim=embed_dim, value_dim=embed_dim // heads, bias=True, position=position
            )
            for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
                assert isinstance(linear, nn.Linear)
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
            return layer

        self.encode = nn.Linear(in_dim + (0 if mode == "positional" else nodes), embed_dim)
        layers = layers or math.floor(math.log2(n)) + 1
        self.attentions = nn.ModuleList(attention() for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * embed_dim, mlp_hidden), nn.ReLU(), nn.Linear(mlp_hidden, embed_dim))
            for _ in range(layers)
        )
        self.decode = nn.Linear(embed_dim, out_dim)

    def forward(
        self, x: Float[Tensor, "row node in_dim"], labels: Float[Tensor, "row node out_dim"] | None = None
    ) -> HostOutput:
        x = nn.functional.pad(x, (0, 0, 0, self.extra))
        if self.places is not None:
            x = torch.cat([x, self.places.expand(len(x), -1, -1)], -1)
        h = self.encode(x)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            h = mlp(torch.cat([h, attention(h)], -1))
        y = self.decode(h[:, : h.shape[1] - self.extra])
        if labels is None:
            return HostOutput(y)
        nll = nn.functional.mse_loss(y, labels)
        return HostOutput(y, nll, nll)


def running_median(x: Numbers) -> Numbers:
    return torch.stack([x[:, : end + 1].quantile(0.5, dim=1) for end in range(x.shape[1])], 1)


def best_segment(x: Numbers) -> Numbers:
    """The largest sum of a segment within each prefix."""
    ending, found = x[:, 0], [x[:, 0]]
    for node in x.unbind(1)[1:]:
        ending = torch.maximum(ending, torch.zeros_like(ending)) + node
        found.append(torch.maximum(found[-1], ending))
    return torch.stack(found, 1)


TASKS: dict[str, Callable[[Numbers], Numbers]] = {
    "sum": lambda x: x.cumsum(1),
    "min": lambda x: x.cummin(1).values,
    "median": running_median,
    "sort": lambda x: x.sort(1).values,
    "max_segment": best_segment,
}
"""What is asked of n numbers: a number a node, of those up to it (sort: of all)."""


def spread(rows: int, n: int, high: float, generator: torch.Generator, beyond: float | None = None) -> Numbers:
    """Each row uniform between two numbers that are themselves uniform in [-high, high], so that magnitudes vary; with
    `beyond`, only such two as are not both within [-beyond, beyond]."""
    ends = torch.empty(0, 2)
    while len(ends) < rows:
        drawn = high * (2 * torch.rand(2 * rows, 2, generator=generator) - 1)
        if beyond is not None:
            drawn = drawn[drawn.abs().amax(1) > beyond]
        ends = torch.cat([ends, drawn])
    low, top = ends[:rows].sort(1).values.split(1, 1)
    return low + (top - low) * torch.rand(rows, n, generator=generator)
