"""Training with whole heads switched off at every step, so that no head becomes indispensable.

z'_h = xi_h z_h,   xi_h = 0 for n heads of the model, drawn at random (Mask-Rand) or those that matter most to the
                   batch (Mask-Impt): the n largest |dL/dxi_h| at xi = 1
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention.edits import Blend, Edit, HeadGain
from headwise.attention.run import attend
from headwise.errors import HeadwiseError
from headwise.models.anatomy import find_sites
from headwise.models.open import Opened
from headwise.paper import Paper


class HeadMask(nn.Module):
    """A model that masks heads while it trains, and is the model itself in eval mode and with `n=0`.

    `n` heads of the whole model, over all layers and kinds of attention (scope "global"), or of every layer
    ("per_layer"); None: an eighth, at least one. One draw holds for the whole batch. "global" can switch off a whole
    layer, whose residual stream goes on. `rescale` multiplies the others by N / (N - n), which the paper doesn't.

    `mode="impt"` needs an output with a `loss`, and a second forward and backward, whose gradients go to the gates
    alone and which sees the same dropout. What the paper leaves open of it is chosen so: one batch decides, and layers
    are not normalised. Attention dropout must be off, and gradient checkpointing, which would run without the mask.

    >>> trained = train(HeadMask(model, mode="impt"), data, recipe)
    """

    paper: ClassVar[Paper] = Paper(
        "Alleviating the Inequality of Attention Heads for Neural Machine Translation", "2009.09672"
    )

    def __init__(
        self,
        model: Opened | nn.Module,
        n: int | None = None,
        mode: Literal["rand", "impt"] = "rand",
        scope: Literal["global", "per_layer"] = "global",
        rescale: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if mode not in ("rand", "impt") or scope not in ("global", "per_layer"):
            raise HeadwiseError(f"mode: rand or impt, scope: global or per_layer; got {mode!r}, {scope!r}.")
        model = model.model if isinstance(model, Opened) else model
        self.sites = find_sites(model)
        if not self.sites:
            raise HeadwiseError(f"HeadMask: {type(model).__name__} has no attention layer that can be found.")
        counts = [site.heads for site in self.sites]
        most = sum(counts) if scope == "global" else min(counts)
        self.n = max(1, most // 8) if n is None else n
        if not 0 <= self.n < most:
            raise HeadwiseError(f"n: wanted 0 to {most - 1} heads; got {n}.")
        self.model, self.mode, self.scope, self.rescale = model, mode, scope, rescale
        self.masked: list[tuple[int, int]] = []
        """The last step's: numbers of the layer (of all kinds, in the model's order) and the head."""
        self._chance = random.Random(seed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or self.n == 0:
            return self.model(*args, **kwargs)
        if self.mode == "rand":
            rank = [[self._chance.random() for _ in range(site.heads)] for site in self.sites]
        else:
            with torch.random.fork_rng():
                rank = [part.tolist() for part in head_gradients(self.model, lambda: self.loss(args, kwargs))]
        self.masked = largest(rank, self.n, self.scope)
        with attend(self.model, edits=self.edits()):
            return self.model(*args, **kwargs)

    def loss(self, args: tuple, kwargs: dict[str, Any]) -> Float[Tensor, ""]:
        loss = getattr(self.model(*args, **kwargs), "loss", None)
        if loss is None:
            raise HeadwiseError('HeadMask(mode="impt") wants a model whose output has a loss: give it labels.')
        return loss

    def edits(self) -> list[Edit]:
        """Heads of different streams need edits of their own."""
        edits: list[Edit] = []
        total = sum(site.heads for site in self.sites)
        off = self.n if self.scope == "global" else self.n * len(self.sites)
        for stream in dict.fromkeys(site.stream for site in self.sites):
            here = [(self.sites[n].layer, head) for n, head in self.masked if self.sites[n].stream == stream]
            if self.rescale:
                edits.append(HeadGain(stream=stream, gain=total / (total - off)))
            if here:
                edits.append(HeadGain(stream=stream, heads=here, gain=0.0))
        return edits


def largest(rank: list[list[float]], n: int, scope: str) -> list[tuple[int, int]]:
    """(layer, head) of the n largest numbers, of all or of every layer."""
    everywhere = [[(value, layer, head) for head, value in enumerate(row)] for layer, row in enumerate(rank)]
    pools = [list(chain.from_iterable(everywhere))] if scope == "global" else everywhere
    return sorted((layer, head) for pool in pools for _, layer, head in sorted(pool, reverse=True)[:n])


def head_gradients(model: nn.Module, loss: Callable[[], Float[Tensor, ""]]) -> list[Float[Tensor, " heads"]]:
    """`|dL/dxi_h|` of every attention layer's heads: the first-order effect of removing each, `|<z_h, dL/dz_h>|`.
    No gradients are left in the model's parameters."""
    gates, edits = [], []
    with torch.enable_grad():
        for site in find_sites(model):
            device = next(site.module.parameters()).device
            gates.append(torch.ones(site.heads, device=device, requires_grad=True))
            nothing = torch.zeros(site.heads, site.value_dim, device=device)
            edits.append(Blend(stream=site.stream, layer=site.layer, alpha=1 - gates[-1], target=nothing))
        with attend(model, edits=edits):
            value = loss()
        found = torch.autograd.grad(value, gates)
    return [part.abs() for part in found]
