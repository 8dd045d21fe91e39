"""Scores by a small network that sees a query and a key together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from headwise.attention.call import AttentionCall
from headwise.attention.once import numbers
from headwise.errors import HeadwiseError
from headwise.swap.parts.scores import Score

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu}
Act = Literal["relu", "leaky_relu", "gelu"]


class PairMLP(Score):
    """`s_ij = W3 f(W2 f(W1 [q'_i; k'_j] + b1) + b2) + b3`, `q' = W_q q + b`, `k' = W_k k + b`, f = `act`, no 1/sqrt(d)
    ("Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models", arXiv 2502.17206).

    `dim`: of a head's queries and keys; q' and k' are `proj_dim` wide (dim // 32, at least 2), the hidden layers
    `hidden` (proj_dim and half of it). One network for all heads, or with `heads` one each. `W1 [q'; k']` is computed
    as `A q' + C k'`, so that what exists for every pair is one hidden layer, and that for `tile` keys at a time, with
    gradients too (they compute a tile again). Hidden biases start at 0.1: where the last hidden layer, which can be a
    single unit, is 0, a pair's score is constant and learns nothing (`dead_share`).
    """

    def __init__(
        self, dim: int, proj_dim: int | None = None, hidden: tuple[int | None, int | None] = (None, None),
        heads: int | None = None, act: Act = "relu", tile: int = 128,
    ):  # fmt: skip
        super().__init__()
        proj = max(2, dim // 32) if proj_dim is None else proj_dim
        one, two = hidden[0] or proj, hidden[1] or max(1, proj // 2)
        if min(dim, proj, one, two, tile) < 1:
            raise HeadwiseError(
                f"PairMLP: sizes are positive; got dim={dim}, proj_dim={proj_dim}, hidden={hidden}, tile={tile}."
            )
        if act not in ACTIVATIONS:
            raise HeadwiseError(f"PairMLP: act is one of {', '.join(ACTIVATIONS)}; got {act!r}.")
        self.act, self.tile, self.heads = act, tile, heads
        nets = heads or 1
        self.q_shrink, self.k_shrink = Linears(nets, dim, proj), Linears(nets, dim, proj)
        self.first_q = Linears(nets, proj, one, fan_in=2 * proj)
        self.first_k = Linears(nets, proj, one, bias=False, fan_in=2 * proj)
        self.second, self.last = Linears(nets, one, two), Linears(nets, two, 1)
        for layer in (self.first_q, self.second):
            assert layer.bias is not None
            nn.init.constant_(layer.bias, 0.1)

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        net = self.net(call, q)
        left, right = self.halves(q, k, net)
        tiles = right.split(self.tile, 2)
        if len(tiles) == 1:
            return self.score(left, right, net)
        if torch.is_grad_enabled():
            parts = [checkpoint(self.score, left, t, net, use_reentrant=False, preserve_rng_state=False) for t in tiles]
        else:
            parts = [self.score(left, t, net) for t in tiles]
        return torch.cat(parts, -1)

    def net(self, call: AttentionCall, q: Tensor) -> Tensor | None:
        """The networks of a call's heads, as numbers; None for the one that all share."""
        if self.heads is None:
            return None
        assert call.head_ids is not None
        return numbers(tuple(call.head_ids), q.device)

    def halves(self, q: Tensor, k: Tensor, net: Tensor | None) -> tuple[Tensor, Tensor]:
        """`A q' + b1` and `C k'`, whose sums are the first hidden layer's inputs."""
        return self.first_q(self.q_shrink(q, net), net), self.first_k(self.k_shrink(k, net), net)

    def last_hidden(
        self, left: Tensor, right: Tensor, net: Tensor | None
    ) -> Float[Tensor, "batch heads query key hidden"]:
        act = ACTIVATIONS[self.act]
        pair = act(left[:, :, :, None] + right[:, :, None])
        return act(self.second(pair, net))

    def score(self, left: Tensor, right: Tensor, net: Tensor | None) -> Float[Tensor, "batch heads query key"]:
        return self.last(self.last_hidden(left, right, net), net)[..., 0]

    @torch.no_grad()
    def dead_share(
        self, q: Float[Tensor, "batch heads query dim"], k: Float[Tensor, "batch heads key dim"], call: AttentionCall
    ) -> float:
        """The share of pairs for which no unit of the last hidden layer is above 0."""
        net = self.net(call, q)
        return (self.last_hidden(*self.halves(q, k, net), net) <= 0).all(-1).double().mean().item()

    def flops(self, queries: int, keys: int, heads: int, dim: int) -> int:
        proj, one, two = self.q_shrink.out, self.first_q.out, self.second.out
        return 2 * heads * ((queries + keys) * proj * (dim + one) + queries * keys * (one * two + two))


class Linears(nn.Module):
    """A linear map for every head, or one for all. `fan_in`: of what the initial weights take themselves to be."""

    def __init__(self, nets: int, width: int, out: int, bias: bool = True, fan_in: int | None = None):
        super().__init__()
        self.out, bound = out, (fan_in or width) ** -0.5
        self.weight = nn.Parameter(torch.empty(nets, out, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(nets, out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Float[Tensor, "batch heads *token width"], net: Tensor | None) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if net is None:
            return F.linear(x, weight[0], None if bias is None else bias[0])
        flat = x.flatten(2, -2)
        y = flat @ weight[net].mT
        y = y if bias is None else y + bias[net][:, None]
        return y.unflatten(2, x.shape[2:-1])
