"""Heads as experts: some always work, of the others every token picks a few, and each output has a weight of its own.

    y_t = sum_i g_ti z_ti W_O^i,     g_t = [a1 s, a2 r],     (a1, a2) = 2 softmax(W_h x_t)
    s = h_s softmax(W_s x_t)         over the h_s shared heads, the first ones (1 where there is one)
    r = K (p o m) / sum(p o m)       over the others, p = softmax(W_r x_t), m = 1 for the K largest

The factors h_s, K and 2, which the paper leaves out and its code has, make even gates those of multi-head attention.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attention.call import AttentionCall
from headwise.attention.form import Form
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads
from headwise.swap.kernels import fits
from headwise.swap.parts.positions import Places

LONG, FEW = 16384, 0.5
"""From so many queries on, and up to this share of active heads, skipping the others was measured to be quicker than
PyTorch's attention for all of them (benchmarks/swap_gpu.py)."""


class RoutedForm(Form):
    """Plain attention of which some rows of some heads are not wanted."""

    def __init__(self, active: Bool[Tensor, "batch query heads"]):
        self.active = active

    def has_kernel(self, call: AttentionCall) -> bool:
        return fits(call) and not torch.is_grad_enabled()

    def kernel(self, call: AttentionCall) -> Heads:
        from headwise.swap.kernels.routed import routed_attention  # triton is not installed everywhere

        causal = call.mask.right == 0
        with torch.cuda.device(call.q.device):
            return routed_attention(
                call.q, call.k, call.v, self.active, call.scale, causal, call.first - call.j0, call.mask.key_valid
            )


class MixtureOfHeadAttention(Attention):
    """MoH: `shared` heads that always work (by default half of them, the first) and `topk` of the others for each token
    (by default a quarter of all), both rounded down; `topk=0` makes all heads shared.

    `router`: "learned", the gates above; or "qnorm", which needs no parameters and is what trained models are converted
    with: others are ranked by `softmax(|q_i| / std)`, std over the heads of one token, and gates are 0 or 1. Its choice
    has the gradient of the softmax (straight-through). With all heads picked it is the layer it came from.

    `aux_loss`, in training with a learned router: `balance_weight * h_r sum_i P_i f_i`, P_i the mean of p_i and f_i the
    share of tokens that picked head i: `balance_weight * K` where all are used alike. The paper averages it over
    layers with 0.01; `swap.aux_loss` sums, so divide by their number. Padding counts as tokens.

    On a GPU, without gradients, from 16,384 tokens on and where at most half of the heads are active, those a token did
    not pick are skipped (`kernels/routed.py`); elsewhere that is no quicker, and all are computed and weighted. `gates`
    [batch, token, heads] are those of the last forward.
    """

    paper: ClassVar[Paper] = Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", "2410.11842")
    what: ClassVar[str] = "each token picks some of the heads, each with a weight"

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        shared: int | None = None, topk: int | None = None, router: Literal["learned", "qnorm"] = "learned",
        balance_weight: float = 0.01, **own: Any,
    ):  # fmt: skip
        super().__init__(dim, heads, kv_heads, head_dim, **own)
        self.shared = heads // 2 if shared is None and topk != 0 else heads if shared is None else shared
        self.topk = (heads // 4 if self.shared < heads else 0) if topk is None else topk
        others = heads - self.shared
        if not 0 <= self.shared <= heads or not min(1, others) <= self.topk <= others:
            raise HeadwiseError(
                f"shared, topk: wanted at most {heads} shared heads, and 1 to all of the others picked; got "
                f"shared={self.shared}, topk={self.topk}."
            )
        if router not in ("learned", "qnorm"):
            raise HeadwiseError(f"router: wanted learned or qnorm; got {router!r}.")
        self.router, self.balance_weight = router, balance_weight
        learned = router == "learned"
        self.pick = nn.Linear(dim, others, bias=False) if learned and others else None
        self.share = nn.Linear(dim, self.shared, bias=False) if learned and self.shared > 1 else None
        self.balance = nn.Linear(dim, 2, bias=False) if learned and others and self.shared else None
        self.gates: Tensor | None = None
        self._gates: Tensor | None = None

    @property
    def active_share(self) -> float:
        """The share of heads that work for a token."""
        return (self.shared + self.topk) / self.heads

    def project(
        self, x: Float[Tensor, "batch query dim"], source: Float[Tensor, "batch key dim"], here: Places,
        crossed: bool = False,
    ) -> tuple[Heads, Heads, Heads]:  # fmt: skip
        q, k, v = super().project(x, source, here, crossed)
        self._gates = self.learned_gates(x) if self.router == "learned" else self.norm_gates(q)
        self.gates = self._gates.detach()
        return q, k, v

    def attend(self, q: Heads, k: Heads, v: Heads, mask: Mask, here: Places, j0: int = 0, **how: Any) -> Heads:
        gates, self._gates = self._gates, None
        assert gates is not None
        worth = q.is_cuda and q.shape[2] >= LONG and self.active_share <= FEW
        if worth and self.form is None and not torch.is_grad_enabled():
            how.setdefault("form", RoutedForm(gates != 0))
        return super().attend(q, k, v, mask, here, j0, **how) * gates.mT[..., None].to(q.dtype)

    def learned_gates(self, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token heads"]:
        ones = x.new_ones(*x.shape[:2], self.shared)
        s = ones if self.share is None else self.shared * torch.softmax(self.share(x), -1)
        if self.pick is None:
            self.aux_loss = None
            return s
        p = torch.softmax(self.pick(x), -1)
        m = picked(p, self.topk)
        kept = p * m
        r = self.topk * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
        even = (p.flatten(0, 1).mean(0) * m.flatten(0, 1).mean(0)).sum()
        self.aux_loss = self.balance_weight * p.shape[-1] * even if self.training else None
        if self.balance is None:
            return r
        a = 2 * torch.softmax(self.balance(x), -1)
        return torch.cat([a[..., :1] * s, a[..., 1:] * r], -1)

    def norm_gates(self, q: Heads) -> Float[Tensor, "batch token heads"]:
        """Rotations keep norms, so turned queries do."""
        ones = q.new_ones(q.shape[0], q.shape[2], self.shared)
        if self.shared == self.heads:
            return ones
        norms = q[:, self.shared :].norm(dim=-1).mT
        # One head alone has no spread, equal ones none: then all are as likely.
        std = norms.std(-1, keepdim=True) if norms.shape[-1] > 1 else torch.ones_like(norms)
        p = torch.softmax(norms / std.clamp(min=torch.finfo(std.dtype).eps), -1)
        return torch.cat([ones, picked(p, self.topk) + (p - p.detach())], -1)

    def flops(self, queries: int, keys: int | None = None) -> int:
        routers = (m for m in (self.pick, self.share, self.balance) if m is not None)
        return super().flops(queries, keys) + sum(2 * queries * self.dim * m.out_features for m in routers)

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        """By default with the router that needs no training. Equal output at the start only with all heads picked:
        "qnorm" with `topk` all others."""
        return super().from_site(site, causal, **{"router": "qnorm", **own})


def picked(p: Float[Tensor, "*token heads"], count: int) -> Float[Tensor, "*token heads"]:
    """1 for the `count` largest, 0 for the others."""
    return torch.zeros_like(p).scatter(-1, p.topk(count, -1).indices, 1.0)
