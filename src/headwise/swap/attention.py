"""Attention out of parts: any score function with any normaliser and any positions.

    s_ij = score(q_i, k_j) + bias(i - j),   a_i = normalise(s_i),   y = sum over heads of (sum_j a_ij v_j) W_O

The ordinary kind runs on PyTorch's own kernels. Mechanisms that change a step override that step.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attention.call import AttentionCall
from headwise.attention.form import Form, attended
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.cache import Cache, Entries
from headwise.swap.mechanism import Mechanism, Visible
from headwise.swap.parts.normalisers import Normaliser, Softmax
from headwise.swap.parts.positions import Places, Position
from headwise.swap.parts.scores import Score

Heads = Float[Tensor, "batch heads token dim"]


class PartsForm(Form):
    """A score function and a normaliser, as the core runs them."""

    def __init__(self, score: Score, normaliser: Normaliser):
        self.score, self.normaliser = score, normaliser
        self.local, self.softmax = score.local, normaliser.softmax  # type: ignore[misc]

    def scores(self, q: Heads, k: Heads, call: AttentionCall) -> Tensor:
        return self.score(q, k, call)

    def weights(self, s: Tensor, seen: Tensor) -> Tensor:
        return self.normaliser(s, seen)

    def has_kernel(self, call: AttentionCall) -> bool:
        if self.softmax:
            return self.score.has_kernel(call)
        return self.score.plain and self.normaliser.has_kernel(call)

    def kernel(self, call: AttentionCall) -> Heads:
        return self.score.kernel(call) if self.softmax else self.normaliser.kernel(call)


class Attention(Mechanism):
    """Multi-head attention, grouped (`kv_heads`), with heads of any width (`head_dim`, `value_dim`).

    `qk_norm`: RMSNorm of every head's queries and keys before they are turned. `bias`: of the projections.
    """

    paper: ClassVar[Paper] = Paper("Attention Is All You Need", "1706.03762")
    what: ClassVar[str] = "softmax of scaled dot products; every part can be exchanged"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        value_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        score: Score | None = None,
        normaliser: Normaliser | None = None,
        position: Position | None = None,
        qk_norm: bool = False,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, causal=causal)
        for name, part, kind in (
            ("score", score, Score), ("normaliser", normaliser, Normaliser), ("position", position, Position),
        ):  # fmt: skip
            if not isinstance(part, kind | None):
                raise HeadwiseError(f"{type(self).__name__}: {name} wants a {kind.__name__}; got {part!r}.")
        if value_dim is not None and value_dim < 1:
            raise HeadwiseError(f"{type(self).__name__}: value_dim must be at least 1; got {value_dim}.")
        self.value_dim = value_dim or self.head_dim
        self.scale = self.head_dim**-0.5
        self.q_proj = nn.Linear(dim, self.heads * self.head_dim, bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.value_dim, bias)
        self.o_proj: nn.Module = nn.Linear(self.heads * self.value_dim, dim, bias)
        self.score, self.normaliser = score or Score(), normaliser or Softmax()
        self.position = position or Position()
        self.q_norm: nn.Module = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()

    @property
    def form(self) -> Form | None:
        """How scores become weights; None for the kind that libraries have kernels for."""
        return None if self.score.plain and self.normaliser.softmax else PartsForm(self.score, self.normaliser)

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        entries = self.entries(cache, context)
        here = self.places(x, positions, entries)
        q, k, v = self.project(x, x if context is None else context, here, context is not None)
        if entries is not None:
            k, v = self.remember(entries, k, v)
            entries.length += x.shape[1]
        z = self.attend(q, k, v, self.visible(mask, len(x)), here)
        return self.combine(z, x)

    def remember(self, entries: Entries, k: Heads, v: Heads) -> tuple[Heads, ...]:
        """Keys and values of all tokens so far; mechanisms that can do with less keep less."""
        return entries.extend(k=k, v=v)

    def project(
        self,
        x: Float[Tensor, "batch query dim"],
        source: Float[Tensor, "batch key dim"],
        here: Places,
        crossed: bool = False,
    ) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values; keys of another sequence count from its own start."""
        there = Places(torch.arange(source.shape[1], device=x.device)[None]) if crossed else here
        q = self.position.turn(self.q_norm(split(self.q_proj(x), self.heads)), here)
        k = self.position.turn(self.raw_keys(source), there)
        return q, k, split(self.v_proj(source), self.kv_heads)

    def raw_keys(self, source: Float[Tensor, "batch key dim"]) -> Heads:
        """Keys before they are turned."""
        return self.k_norm(split(self.k_proj(source), self.kv_heads))

    def attend(self, q: Heads, k: Heads, v: Heads, mask: Mask, here: Places, j0: int = 0, **how: Any) -> Heads:
        """Every head's output. `how` changes further fields of the call."""
        if not q.shape[2] or not k.shape[2]:  # nobody asks, or there is nothing to see
            return q.new_zeros(*q.shape[:3], v.shape[3])
        rows = here.first, here.first + q.shape[2]
        i = torch.arange(*rows)
        bias = self.position.bias(self.heads, i, torch.arange(j0, j0 + k.shape[2]))
        how.setdefault("form", self.form)
        # Made there, not copied: a copy would wait for the device, and no CUDA graph could be captured.
        there = torch.arange(*rows, device=q.device)
        call = AttentionCall(
            q, k, v, self.scale, mask,
            bias=None if bias is None else bias.to(q), i=there, j0=j0, host_i=i, **how,
        )  # fmt: skip
        return attended(call)

    def combine(self, z: Heads, x: Float[Tensor, "batch query dim"]) -> Float[Tensor, "batch query dim"]:
        """The heads' outputs as one. x: the layer's input, for gates."""
        return self.o_proj(merge(z))

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        width_q, width_k = self.heads * self.head_dim, self.kv_heads * (self.head_dim + self.value_dim)
        projections = 2 * self.dim * (queries * width_q + keys * width_k + queries * self.heads * self.value_dim)
        scores = self.score.flops(queries, keys, self.heads, self.head_dim)
        return projections + scores + 2 * queries * keys * self.heads * self.value_dim

    @classmethod
    def host_parts(cls, position: Position) -> dict[str, Any]:
        return {"position": position}

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        """This mechanism with the weights of a trained layer: its projections, its norms of queries and keys, and its
        scale. What the mechanism has beyond that is as `own` says."""
        W_Q, W_K, W_V = site.W_Q, site.W_K, site.W_V
        made = cls(
            W_Q.shape[1], site.heads, site.kv_heads, site.head_dim,
            **{"value_dim": site.value_dim, "causal": causal, **own},
        )  # fmt: skip
        with torch.no_grad():
            for linear, weight, bias in (
                (made.q_proj, W_Q, site.b_Q), (made.k_proj, W_K, site.b_K), (made.v_proj, W_V, site.b_V),
            ):  # fmt: skip
                fill(linear, weight.transpose(1, 2).flatten(0, 1), None if bias is None else bias.flatten())
            if site.out in list(site.module.modules()):
                assert isinstance(made.o_proj, nn.Linear)
                fill(made.o_proj, site.W_O.flatten(0, 1).T, site.b_O)
            else:
                made.o_proj = nn.Identity()  # the host has it outside the layer
        made.to(W_Q.dtype).to(W_Q.device)
        made.scale = float(getattr(site.module, "scaling", made.scale))
        for name in ("q_norm", "k_norm"):
            norm = getattr(site.module, name, None)
            if isinstance(norm, nn.Module):
                setattr(made, name, copy.deepcopy(norm))  # training it must not change the model's own
        return made


def fill(linear: nn.Linear, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
    """A copy of trained weights; a bias that was not there is taken away."""
    linear.weight = nn.Parameter(weight.detach().clone().contiguous())
    linear.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # type: ignore[assignment]


def split(x: Float[Tensor, "batch token width"], heads: int) -> Heads:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(z: Heads) -> Float[Tensor, "batch token width"]:
    return z.transpose(1, 2).flatten(2)
