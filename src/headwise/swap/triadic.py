"""Attention among the few strongest results of queries, keys and values that modulate each other beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attention.call import AttentionCall
from headwise.attention.form import attended
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.attention import merge, split
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Mechanism, Visible
from headwise.swap.parts.positions import Places

Rule = Literal["isolation", "additive", "ad", "ad_awake"]
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "isolation": lambda r, c: r + 0 * c,
    "additive": lambda r, c: r + c,
    "ad": lambda r, c: r * (1 + c),
    "ad_awake": lambda r, c: r**2 + 2 * r + c * (1 + r.abs()),
}
BOUNDS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu6": nn.functional.relu6,
    "half": lambda x: x / 2,
}


def modulate(r: Float[Tensor, "*#shape"], c: Float[Tensor, "*#shape"], rule: Rule = "ad_awake") -> Float[Tensor, "..."]:
    """What a neuron with receptive input r and context c puts out, element by element: r ("isolation"), r + c
    ("additive"), r (1 + c) ("ad", apical drive), r^2 + 2 r + c (1 + |r|) ("ad_awake")."""
    if rule not in RULES:
        raise HeadwiseError(f"rule: one of {', '.join(RULES)}; got {rule!r}.")
    return RULES[rule](r, c)


class LatentTokens(nn.Module):
    """`n` learned tokens put in front of a sequence, as `TriadicAttention` wants them."""

    def __init__(self, n: int, dim: int):
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(n, dim))

    def forward(self, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch more dim"]:
        return torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)


class TriadicAttention(Mechanism):
    """The first `latents` tokens L are latent (a class token), the other N real; with * element by element,

        Qm_i = mod(Q_i, Q_L * K_i),  Km_i = mod(K_i, K_L * Q_i),  Vm_i = mod(V_i, Q_L * K_L)

    of which the `topk` largest over tokens are kept, channel by channel. The latents' own rows and these attend to each
    other: O = softmax(Q' K'^T / sqrt(head_dim)) V' with L + topk rows. What the latents get is put out for them; of the
    tokens `Vm_i`, with O's other rows added in the channels where V's largest came from. Cost is linear in N.

    `rule_qk` and `rule_v` are those of `modulate`, or "latent_awake" for V, `V_i^2 + 2 V_i + C (1 + |V_L|)`, as in the
    authors' vision code (which is additive for Q and K: the token's own projection plus the interaction). Of several
    latents the mean is the context (the paper's own order of them is not published). `iterations` modulate Q and K so
    often, each time with the other's last result. The rules grow like squares: norm the input; `bound` "relu6" or
    "half" tames what they give. `out_proj`: an output matrix, which the vision code has not.

    Row r of what attends holds every channel's r-th largest value, so that it is no token: readings see ranks (latents
    first), and `selection_map` says which tokens they come from. All tokens compete: there is no causal form. A
    converted model's output is another one at step 0.
    """

    paper: ClassVar[Paper] = Paper(
        "Beyond Attention: Toward Machines with Intrinsic Higher Mental States", "2505.06257"
    )
    what: ClassVar[str] = "queries, keys and values modulate each other; the strongest few attend"
    causal_too: ClassVar[bool] = False
    context_too: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = False,
        latents: int = 1,
        topk: int = 12,
        rule_qk: Rule = "additive",
        rule_v: Rule | Literal["latent_awake"] = "ad_awake",
        iterations: int = 1,
        bound: Literal["relu6", "half"] | None = None,
        out_proj: bool = False,
        bias: bool = False,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, causal=causal)
        if self.kv_heads != heads or heads * self.head_dim != dim:
            raise HeadwiseError(
                f"TriadicAttention modulates channel by channel: heads side by side must be dim wide; got dim={dim}, "
                f"heads={heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}."
            )
        if latents < 1 or topk < 1 or iterations < 1:
            raise HeadwiseError(
                f"TriadicAttention: latents, topk and iterations of at least 1; got {latents}, {topk}, {iterations}."
            )
        if rule_qk not in RULES or rule_v not in (*RULES, "latent_awake") or bound not in BOUNDS:
            raise HeadwiseError(
                f"TriadicAttention: rules are {', '.join(RULES)}, for V also latent_awake, bound relu6, half or None; "
                f"got {rule_qk!r}, {rule_v!r}, {bound!r}."
            )
        self.latents, self.topk, self.iterations = latents, topk, iterations
        self.rule_qk, self.rule_v, self.bound = rule_qk, rule_v, bound
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias) for _ in range(3))
        self.o_proj: nn.Module = nn.Linear(dim, dim, bias) if out_proj else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        if context is not None:
            raise HeadwiseError("TriadicAttention works on one sequence: leave out context.")
        self.entries(cache, context)  # refuses a cache
        own, tokens = self.modulated(x)
        real = self.real(mask, x)
        rows, chosen = zip(*(self.strongest(part, real) for part in tokens), strict=True)
        kept = None
        if real is not None:  # the last ranks are empty where there are fewer tokens
            count = real.sum(1, keepdim=True)
            kept = torch.cat([real.new_ones(len(x), self.latents), torch.arange(self.topk, device=x.device) < count], 1)
        q, k, v = (split(torch.cat(both, 1), self.heads) for both in zip(own, rows, strict=True))
        z = merge(attended(AttentionCall(q, k, v, self.head_dim**-0.5, Mask(key_valid=kept, batch=len(x)))))
        y = tokens[2].scatter_add(1, chosen[2], z[:, self.latents :].to(tokens[2]))
        return self.o_proj(torch.cat([z[:, : self.latents].to(y), y], 1))

    def modulated(self, x: Float[Tensor, "batch token dim"]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Q, K, V of the latents, and those of the tokens after modulation."""
        own, (q, k, v) = zip(
            *((p[:, : self.latents], p[:, self.latents :]) for p in (self.q_proj(x), self.k_proj(x), self.v_proj(x))),
            strict=True,
        )
        q_l, k_l, v_l = (part.mean(1, keepdim=True) for part in own)
        bound = BOUNDS[self.bound]
        for _ in range(self.iterations):
            q, k = (bound(modulate(r, c, self.rule_qk)) for r, c in ((q, q_l * k), (k, k_l * q)))
        if self.rule_v == "latent_awake":
            v = v**2 + 2 * v + q_l * k_l * (1 + v_l.abs())
        else:
            v = modulate(v, q_l * k_l, self.rule_v)
        return own, (q, k, bound(v))

    def strongest(
        self, part: Float[Tensor, "batch token dim"], real: Bool[Tensor, "batch token"] | None
    ) -> tuple[Float[Tensor, "batch rank dim"], Int[Tensor, "batch rank dim"]]:
        """The largest values of every channel, and the tokens they are of."""
        if part.shape[1] < self.topk:
            raise HeadwiseError(f"TriadicAttention keeps topk={self.topk} tokens; got {part.shape[1]}: lower topk.")
        if real is None:
            return part.topk(self.topk, 1)
        values, where = part.masked_fill(~real[..., None], -torch.inf).topk(self.topk, 1)
        return values.masked_fill(values == -torch.inf, 0.0), where

    def real(self, mask: Visible, x: Tensor) -> Bool[Tensor, "batch token"] | None:
        """Which of the tokens behind the latents are no padding."""
        seen = self.visible(mask, len(x))
        if any(part is not None for part in (seen.left, seen.right, seen.rule, seen.allowed, seen.added, seen.indices)):
            raise HeadwiseError("TriadicAttention: tokens compete before any mask: give padding as bools [batch, key].")
        return None if seen.key_valid is None else seen.key_valid[:, self.latents :]

    @torch.no_grad()
    def selection_map(
        self, x: Float[Tensor, "batch token dim"], part: Literal["q", "k", "v"] = "v"
    ) -> Float[Tensor, "batch token"]:
        """In what share of the channels a token is among the `topk` strongest (the latents left out)."""
        values = self.modulated(x)[1]["qkv".index(part)]
        _, where = self.strongest(values, None)
        return torch.zeros_like(values).scatter(1, where, 1.0).mean(-1)

    def flops(self, queries: int, keys: int | None = None) -> int:
        rows = self.latents + self.topk
        projections = 2 * queries * self.dim**2 * (4 if isinstance(self.o_proj, nn.Linear) else 3)
        modulation = 6 * (2 * self.iterations + 1) * queries * self.dim
        return projections + modulation + 4 * rows**2 * self.dim
