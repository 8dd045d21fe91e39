"""Small models around any mechanism: a decoder, an encoder and an image model, pre-norm, for training in minutes.

    model = Decoder(lambda layer: swap.Attention(64, 4, causal=True), vocabulary=65, dim=64, layers=2)
    out = model(input_ids=ids, labels=ids)      # .loss with the mechanisms' own losses in it, .logits, .nll without

`matched` widens or narrows the feed-forward part so that models with different mechanisms have equally many parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.swap import Cache, aux_loss

Make = Callable[[int], nn.Module]
"""The mechanism of a layer (numbered from 0)."""


@dataclass
class HostOutput:
    logits: Float[Tensor, "batch token vocabulary"]
    loss: Float[Tensor, ""] | None = None
    """What to train on: `nll` and what the mechanisms ask for."""
    nll: Float[Tensor, ""] | None = None
    """The task's own loss."""


class Block(nn.Module):
    """`x + mechanism(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, mechanism: nn.Module, dim: int, hidden: int):
        super().__init__()
        self.mechanism = mechanism
        self.norm, self.norm_mlp = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.mechanism(self.norm(x), mask=mask, cache=cache)
        return x + self.mlp(self.norm_mlp(x))


class Host(nn.Module):
    """What the hosts share: blocks, a last norm, a head for every token or for all of them together."""

    def __init__(self, make: Make, dim: int, layers: int, classes: int, hidden: int | None, pooled: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(make(layer), dim, hidden or 4 * dim) for layer in range(layers))
        self.norm, self.head, self.pooled = nn.RMSNorm(dim), nn.Linear(dim, classes, bias=False), pooled

    def read(
        self,
        x: Float[Tensor, "batch token dim"],
        labels: Tensor | None,
        mask: Bool[Tensor, "batch token"] | None,
        cache: Cache | None,
        shift: bool,
    ) -> HostOutput:
        for block in self.blocks:
            x = block(x, mask, cache)
        x = self.norm(x)
        if self.pooled:
            kept = x.new_ones(x.shape[:2]) if mask is None else mask.to(x)
            x = (x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
        logits = self.head(x)
        if labels is None:
            return HostOutput(logits)
        shown, wanted = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
        nll = nn.functional.cross_entropy(shown.flatten(0, -2), wanted.flatten(), ignore_index=-100)
        extra = aux_loss(self)
        return HostOutput(logits, nll if extra is None else nll + extra, nll)


class Decoder(Host):
    """Next-token prediction. `labels` -100 are not asked for. `positions`: learned ones for so many tokens, for
    mechanisms that have none themselves."""

    def __init__(
        self, make: Make, vocabulary: int, dim: int, layers: int, hidden: int | None = None, positions: int = 0
    ):
        super().__init__(make, dim, layers, vocabulary, hidden, pooled=False)
        self.embed = nn.Embedding(vocabulary, dim)
        self.place = nn.Embedding(positions, dim) if positions else None
        for table in (self.embed, self.place):
            if table is not None:  # both small: positions of the usual size 1 would drown the tokens
                nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        labels: Int[Tensor, "batch token"] | None = None,
        cache: Cache | None = None,
    ) -> HostOutput:
        x = self.embed(input_ids)
        if self.place is not None:
            if cache is not None:
                raise HeadwiseError("Decoder: learned positions and a cache together are not supported.")
            x = x + self.place.weight[: input_ids.shape[1]]
        return self.read(x, labels, None, cache, shift=True)


class Encoder(Host):
    """One class for a sequence (`pooled`), or one for every token. Learned positions."""

    def __init__(
        self, make: Make, vocabulary: int, dim: int, layers: int, classes: int, length: int,
        hidden: int | None = None, pooled: bool = True,
    ):  # fmt: skip
        super().__init__(make, dim, layers, classes, hidden, pooled)
        self.embed, self.place = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        labels: Tensor | None = None,
        mask: Bool[Tensor, "batch token"] | None = None,
    ) -> HostOutput:
        x = self.embed(input_ids) + self.place.weight[: input_ids.shape[1]]
        return self.read(x, labels, mask, None, shift=False)


class Vectors(Host):
    """Sequences of vectors (patches of an image, objects): one class for each."""

    def __init__(
        self, make: Make, width: int, dim: int, layers: int, classes: int, length: int,
        hidden: int | None = None, pooled: bool = True,
    ):  # fmt: skip
        super().__init__(make, dim, layers, classes, hidden, pooled)
        self.embed, self.place = nn.Linear(width, dim), nn.Embedding(length, dim)

    def forward(self, x: Float[Tensor, "batch token width"], labels: Tensor | None = None) -> HostOutput:
        return self.read(self.embed(x) + self.place.weight[: x.shape[1]], labels, None, None, shift=False)


def matched(make: Callable[[int], nn.Module], parameters: int, first: int) -> nn.Module:
    """`make(hidden)` with the feed-forward width for which it has `parameters` parameters, as nearly as a width can.
    `first`: a width to start from."""
    counts = [sum(p.numel() for p in make(hidden).parameters()) for hidden in (first, first + 1)]
    hidden = first + round((parameters - counts[0]) / (counts[1] - counts[0]))
    if hidden < 1:
        raise HeadwiseError(f"matched: this mechanism alone has more than {parameters} parameters.")
    return make(hidden)
