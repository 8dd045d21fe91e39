"""Weights that depend on several queries and keys: scores and weights convolved over neighbours, and heads mixed.

s'_h[i, j] = sum_a sum_b theta_h[a, b] s_h[i - a, j + b]     a = 0 .. c_q - 1,  |b| <= (c_k - 1) / 2
s''_h = sum_g w_hg s'_g                                      over all heads, or groups of c_h
a = softmax(s''), then the same two steps on a               (rows no longer sum to 1)
y = sum over heads of sigmoid(w . n_h + b) n_h W_O           n_h = RMSNorm(z_h)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.attention.call import AttentionCall, pick
from headwise.attention.dense import BLOCKED, dense
from headwise.attention.effects import resolve
from headwise.attention.engine import DENSE_PLACES
from headwise.attention.form import Form
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads
from headwise.swap.cache import Cache
from headwise.swap.kernels import fits
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places

Matrix = Float[Tensor, "batch heads query key"]

PLACES = 2**20
"""Query-key pairs a head in one block of rows in PyTorch, where no gradients are needed."""

FUSED_PLACES = 2**19
"""From so many query-key pairs a head on, the Triton kernels are quicker than the whole matrix (measured on an H100,
with gradients; without them the two are equal at half as many)."""


class MultiTokenAttention(Attention):
    """MTA. `pre_kq`, `post_kq`: the convolution, on scores and on weights; `pre_head`, `post_head`: mixing of heads, in
    groups of `c_h` neighbours or of "all". `norm`: of every head's output, times `1 - lambda_l` with `lambda_l = 0.8 -
    0.6 exp(-0.3 l)` where `depth` l is given. `gate`: one for every token and head ("head"), or for each of its
    channels ("channel"). The defaults are those of the paper's language models, which convolve in every fourth layer
    and mix heads in all.

    Kernels `[heads, c_q, c_k]` start as the identity, a 1 in the last row's middle, so that all but norm and gate start
    as plain attention. Scores that are not seen count as 0. A kernel reaches no key that the query itself doesn't see:
    documents packed behind one another stay apart, and rows before a sample's first token, which are padding, count as
    0. A mask for a context says nothing of padding among the queries: there it belongs on the right.

    In a trained layer norm and gate are left out by default: equal output at the start. A cache holds the last
    `c_q - 1` rows of scores and weights beside keys and values. Mixed weights can be negative, and an entropy read from
    them means little. Long calls, causal or full, with or without padding, run in kernels on CUDA, gradients included.
    """

    paper: ClassVar[Paper] = Paper("Multi-Token Attention", "2504.00927")
    what: ClassVar[str] = "scores and weights convolved over queries and keys, and mixed over heads"

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        c_q: int = 6, c_k: int = 11, c_h: int | Literal["all"] = "all",
        pre_kq: bool = True, post_kq: bool = True, pre_head: bool = True, post_head: bool = True,
        norm: bool = True, gate: Literal["head", "channel"] | None = "head", depth: int | None = None, **own: Any,
    ):  # fmt: skip
        super().__init__(dim, heads, kv_heads, head_dim, **own)
        if c_q < 1 or c_k < 1 or c_k % 2 == 0:
            raise HeadwiseError(f"c_q, c_k: wanted a positive and an odd number; got c_q={c_q}, c_k={c_k}.")
        group = heads if c_h == "all" else c_h
        if not isinstance(group, int) or group < 1 or heads % group:
            raise HeadwiseError(f'c_h: wanted "all" or a divisor of {heads} heads; got {c_h!r}.')
        if gate not in ("head", "channel", None):
            raise HeadwiseError(f"gate: wanted head, channel or None; got {gate!r}.")
        kernel = torch.zeros(heads, c_q, c_k)
        kernel[:, -1, c_k // 2] = 1.0
        mixing = torch.eye(group).repeat(heads // group, 1, 1)
        self.pre_kernel, self.post_kernel = (nn.Parameter(kernel.clone()) if on else None for on in (pre_kq, post_kq))
        self.pre_mixing, self.post_mixing = (
            nn.Parameter(mixing.clone()) if on else None for on in (pre_head, post_head)
        )
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5) if norm else None
        self.norm_scale = 1.0 if depth is None else 0.2 + 0.6 * math.exp(-0.3 * depth)
        self.gate = nn.Linear(self.value_dim, 1 if gate == "head" else self.value_dim) if gate else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.bias)

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
        seen = self.visible(mask, len(x))
        past = {} if entries is None else dict(entries.states)
        if entries is not None:
            k, v = entries.extend(k=k, v=v)
            entries.length += x.shape[1]
        i = torch.arange(here.first, here.first + x.shape[1], device=x.device)
        tokens = None if context is not None else tokens_of(seen, i, k.shape[2])
        form = MultiTokenForm(self, seen, past, entries is not None, tokens)
        z = self.attend(q, k, v, seen, here, form=form)
        if entries is not None:
            entries.put(**form.last)
        return self.combine(z, x)

    def combine(self, z: Heads, x: Float[Tensor, "batch query dim"]) -> Float[Tensor, "batch query dim"]:
        if self.norm is not None:
            z = self.norm(z) * self.norm_scale
        if self.gate is not None:
            z = z * torch.sigmoid(self.gate(z))
        return super().combine(z, x)

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        taps = sum(k.shape[1] * k.shape[2] for k in (self.pre_kernel, self.post_kernel) if k is not None)
        mixed = sum(m.shape[-1] for m in (self.pre_mixing, self.post_mixing) if m is not None)
        gate = 0 if self.gate is None else 2 * queries * self.heads * self.gate.weight.numel()
        return super().flops(queries, keys) + 2 * queries * keys * self.heads * (taps + mixed) + gate

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        return super().from_site(site, causal, **{"norm": False, "gate": None, **own})


class MultiTokenForm(Form):
    """Scores and weights of one call. `past`: the rows before it, of what is convolved; `last`: those for the next one,
    which kernels make only where it `keeps` them. `tokens`: the rows that are not padding before a sample's own; None
    where all count, or where such padding sees nothing anyway, as under a causal mask."""

    local = False

    def __init__(
        self, module: MultiTokenAttention, mask: Mask, past: dict[str, Tensor], keeps: bool = True,
        tokens: Bool[Tensor, "#batch query"] | None = None,
    ):  # fmt: skip
        self.module, self.mask, self.past, self.keeps, self.tokens = module, mask, past, keeps, tokens
        self.last: dict[str, Tensor] = {}
        after = module.post_kernel is not None or module.post_mixing is not None
        self.softmax = module.normaliser.softmax and not after  # type: ignore[misc]

    def scores(self, q: Heads, k: Heads, call: AttentionCall) -> Matrix:
        s = self.module.score(q, k, call)
        if self.module.pre_kernel is not None:
            seen = visible(call.mask, call.i, call.j0, call.keys)
            s = self.convolved("scores", s, self.module.pre_kernel, seen)
        return mixed(s, self.module.pre_mixing)

    def weights(self, s: Matrix, seen: Bool[Tensor, "#batch #heads query key"]) -> Matrix:
        a = self.module.normaliser(s, seen)
        if self.module.post_kernel is not None:
            a = self.convolved("weights", a, self.module.post_kernel, seen).masked_fill(~seen, 0.0)
        return mixed(a, self.module.post_mixing)

    def convolved(self, name: str, x: Matrix, kernel: Float[Tensor, "heads c_q c_k"], seen: Tensor) -> Matrix:
        heads, c_q, c_k = kernel.shape
        counted = seen if self.tokens is None else seen & self.tokens[:, None, :, None]
        x, weight = x.masked_fill(~counted, 0.0), kernel[:, None].to(x.dtype)
        # Later keys are in the future of earlier rows: 0 there.
        past = self.past.get(name, x[:, :, :0])
        rows = torch.cat([F.pad(past, (0, x.shape[3] - past.shape[3])), x], 2)
        rows = F.pad(rows, (0, 0, c_q - 1 - past.shape[2], 0))
        self.last[name] = rows[:, :, x.shape[2] :].detach()
        if not self.apart:
            return F.conv2d(F.pad(rows, (c_k // 2, c_k // 2)), weight, groups=heads)
        count = x.shape[2]
        parts = (rows[:, :, a : a + count].masked_fill(~seen, 0.0) for a in range(c_q))
        padding = (0, c_k // 2)
        return torch.stack(
            [F.conv2d(p, weight[:, :, a : a + 1], padding=padding, groups=heads) for a, p in enumerate(parts)]
        ).sum(0)

    @property
    def apart(self) -> bool:
        """Whether earlier rows may see keys that a row doesn't, as in packed documents."""
        mask = self.mask
        return any(x is not None for x in (mask.allowed, mask.added, mask.rule, mask.indices))

    def has_kernel(self, call: AttentionCall) -> bool:
        grads = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
        return self.fused(call) or (not grads and call.queries * call.keys > DENSE_PLACES)

    def fused(self, call: AttentionCall) -> bool:
        """Whether the Triton kernels can do this call and pay: with gradients, but without rows from a cache."""
        post, mixing = self.module.post_kernel, self.module.pre_mixing
        mixing = self.module.post_mixing if mixing is None else mixing
        return (
            fits(call)
            and call.queries * call.keys >= FUSED_PLACES
            and call.q.dtype == call.k.dtype == call.v.dtype
            and not self.past
            and self.module.score.plain
            and self.module.normaliser.softmax
            and (post is None or post.shape[2] <= 33)
            and (mixing is None or mixing.shape[1] <= 64)
        )

    def kernel(self, call: AttentionCall) -> Float[Tensor, "batch heads query value_dim"]:
        halo = sum(k.shape[1] - 1 for k in (self.module.pre_kernel, self.module.post_kernel) if k is not None)
        if not self.fused(call):
            size = max(halo + 1, PLACES // call.keys)
            parts = [self.rows(call, n, min(n + size, call.queries), halo) for n in range(0, call.queries, size)]
            return torch.cat(parts, 2)
        from headwise.swap.kernels.multi_token import multi_token_attention  # triton is not installed everywhere

        module = self.module
        own = module.pre_kernel, module.pre_mixing, module.post_kernel, module.post_mixing
        if self.keeps and halo:
            with torch.no_grad():
                self.rows(call, call.queries - 1, call.queries, halo)
        # Where the order of rows means nothing but who their neighbours are, padding goes behind the sample's own.
        lead = None if self.tokens is None else (~self.tokens).sum(1)
        q = call.q if lead is None else turned(call.q, lead)
        with torch.cuda.device(call.q.device), torch.autocast("cuda", enabled=False):
            out = multi_token_attention(
                q, call.k, call.v, call.scale, *own, call.mask.right == 0, call.first - call.j0, call.mask.key_valid
            )
        return out if lead is None else turned(out, -lead)

    def rows(self, call: AttentionCall, start: int, stop: int, halo: int) -> Heads:
        """Some rows in PyTorch, with the rows before them that their kernels reach: memory is linear in the keys."""
        low = max(0, start - halo)
        part = call.select(torch.arange(low, stop))
        tokens = None if self.tokens is None else self.tokens[:, low:stop]
        form = MultiTokenForm(self.module, part.mask, self.past if low == 0 else {}, tokens=tokens)
        out, _ = dense(resolve(replace(part, form=form), []), [])
        self.last = form.last
        return out[:, :, start - low :]


def mixed(x: Matrix, weight: Float[Tensor, "groups out in"] | None) -> Matrix:
    """Heads mixed within groups of neighbours."""
    if weight is None:
        return x
    groups = x.unflatten(1, weight.shape[:2])
    return torch.einsum("goc,bgcij->bgoij", weight.to(x.dtype), groups).flatten(1, 2)


def visible(mask: Mask, i: Int[Tensor, " query"], j0: int, keys: int) -> Bool[Tensor, "#batch #heads query key"]:
    """Which keys these queries see, whatever the mask says it by."""
    seen = mask.dense(i, j0, keys)
    return seen if mask.added is None else seen & (mask.added > BLOCKED)


def tokens_of(mask: Mask, i: Int[Tensor, " row"], keys: int) -> Bool[Tensor, "#batch row"] | None:
    """Which rows are not before a sample's first token, that is before all keys that any row sees."""
    pairs = any(x is not None for x in (mask.allowed, mask.added, mask.rule))
    if mask.causal or not len(i) or (mask.key_valid is None and not pairs):
        return None
    seen = mask.key_valid
    if pairs:
        found = []
        for rows in torch.arange(len(i), device=i.device).split(max(1, PLACES // keys)):
            part = replace(mask, allowed=pick(mask.allowed, 2, rows), added=pick(mask.added, 2, rows))
            found.append(visible(part, i[rows], 0, keys).any(1).any(1))
        seen = torch.stack(found).any(0)
    return (seen.cumsum(1) > 0)[:, i]  # type: ignore[union-attr]


def turned(x: Heads, by: Int[Tensor, " batch"]) -> Heads:
    """Every sample's rows, begun `by` rows later, those before it at the end."""
    at = (torch.arange(x.shape[2], device=x.device) + by[:, None]) % x.shape[2]
    return x.gather(2, at[:, None, :, None].expand_as(x))
