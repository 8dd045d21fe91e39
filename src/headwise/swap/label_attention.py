"""Heads that stand for labels: each has one learned query, and its part of the output stays its own."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attention.call import AttentionCall
from headwise.attention.form import attended
from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.attention import merge, split
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Mechanism, Visible
from headwise.swap.parts.positions import Places


class LabelAttention(Mechanism):
    """For each of `heads` labels l

        c_l = softmax(q_l K_l^T / sqrt(dim)) V_l,   Y_t,l = norm(D (x_t + P c_l)),   y_t = Y_t,1 ... Y_t,L side by side

    q_l is one learned vector of `head_dim` for all tokens, P [value_dim -> dim] and D [dim -> proj_dim] are shared by
    the labels, none has a bias. So a sequence has one distribution a label, and tokens differ by their own x alone. The
    output is heads * proj_dim wide, which is dim by default; the paper's proj_dim, head_dim and value_dim are 128.
    `norm` is `a (z - mean) / (std + 0.001) + b` with the unbiased std.

    `query="token"`: ordinary queries of every token. `combine="concat"`: the c_l side by side through one matrix to
    dim, `norm(x + W c)`; the labels' parts are mixed then. `ffn`: the width of a feed-forward layer over the whole
    output, `norm(y + W2 relu(W1 y))`, which mixes them too; 0 for none. `partitioned`: x is [content; position], and
    queries, keys, values and P are made half from each.

    Which label a head serves is found afterwards (`scan.label_contribution`). A converted model's output is another
    one at step 0.
    """

    paper: ClassVar[Paper] = Paper(
        "Rethinking Self-Attention: Towards Interpretability in Neural Parsing", "1911.03875"
    )
    what: ClassVar[str] = "one learned query a label; the labels' outputs stay apart"
    causal_too: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        value_dim: int | None = None,
        proj_dim: int | None = None,
        query: Literal["vector", "token"] = "vector",
        combine: Literal["separate", "concat"] = "separate",
        ffn: int = 0,
        partitioned: bool = False,
        causal: bool = False,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, causal=causal)
        self.value_dim = value_dim or self.head_dim
        self.proj_dim = proj_dim or dim // heads
        if self.kv_heads != heads:
            raise HeadwiseError(f"LabelAttention: every label has its own keys: leave out kv_heads; got {kv_heads}.")
        if query not in ("vector", "token") or combine not in ("separate", "concat"):
            raise HeadwiseError(
                f"LabelAttention: query is vector or token, combine separate or concat; got {query!r}, {combine!r}."
            )
        if combine == "separate" and self.proj_dim < 2:
            raise HeadwiseError(f"LabelAttention: proj_dim must be at least 2 to be normed; got {self.proj_dim}.")
        if partitioned and any(width % 2 for width in (dim, self.head_dim, self.value_dim)):
            raise HeadwiseError(
                f"LabelAttention: partitioned wants even widths; got dim={dim}, head_dim={self.head_dim}, "
                f"value_dim={self.value_dim}."
            )

        def linear(d_in: int, d_out: int, labels: int) -> nn.Module:
            made = Halves(d_in, d_out, labels) if partitioned else nn.Linear(d_in, d_out * labels, bias=False)
            for weight in made.parameters():  # Xavier's, of one label
                nn.init.normal_(weight, std=(2 / (d_in + d_out)) ** 0.5)
            return made

        self.combine = combine
        self.k_proj, self.v_proj = linear(dim, self.head_dim, heads), linear(dim, self.value_dim, heads)
        if query == "vector":
            self.query: nn.Parameter | None = nn.Parameter(torch.randn(heads, 1, self.head_dim))
            nn.init.normal_(self.query, std=(2 / (heads + self.head_dim)) ** 0.5)
        else:
            self.query, self.q_proj = None, linear(dim, self.head_dim, heads)
        width = heads * self.proj_dim if combine == "separate" else dim
        if combine == "separate":
            self.back = linear(self.value_dim, dim, 1)
            self.down = nn.Linear(dim, self.proj_dim, bias=False)
            self.norm = SpreadNorm(self.proj_dim)
        else:
            self.o_proj = nn.Linear(heads * self.value_dim, dim, bias=False)
            self.norm = SpreadNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.ReLU(), nn.Linear(ffn, width)) if ffn else None
        self.ffn_norm = SpreadNorm(width) if ffn else None

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query width"]:
        self.entries(cache, context)  # refuses a cache
        source, seen = x if context is None else context, self.visible(mask, len(x))
        if self.query is not None and seen.allowed is not None and seen.allowed.shape[2] > 1:
            raise HeadwiseError("LabelAttention: a label's query is no token's: give a mask of keys, [batch, key].")
        q = split(self.q_proj(x), self.heads) if self.query is None else self.query.expand(len(x), -1, -1, -1)
        k, v = split(self.k_proj(source), self.heads), split(self.v_proj(source), self.heads)
        c = attended(AttentionCall(q, k, v, self.dim**-0.5, seen))
        if self.combine == "concat":
            y = self.norm(x + self.o_proj(merge(c)))
        else:
            y = self.norm(self.down(x)[:, :, None] + self.down(self.back(c.transpose(1, 2)))).flatten(2)
        if self.ffn is None or self.ffn_norm is None:
            return y
        return self.ffn_norm(y + self.ffn(y))

    def slices(self, y: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch label proj_dim"]:
        """The output, label by label."""
        if self.combine == "concat":
            raise HeadwiseError('slices: combine="concat" mixes the labels: their parts are gone.')
        return y.unflatten(-1, (self.heads, self.proj_dim))

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        asked = 1 if self.query is not None else queries
        made = 2 * keys * sum(p.numel() for m in (self.k_proj, self.v_proj) for p in m.parameters())
        if self.query is None:
            made += 2 * queries * sum(p.numel() for p in self.q_proj.parameters())
        scores = 2 * asked * keys * self.heads * (self.head_dim + self.value_dim)
        if self.combine == "concat":
            out = 2 * asked * self.o_proj.weight.numel()
        else:
            back = sum(p.numel() for p in self.back.parameters())
            out = 2 * queries * self.down.weight.numel()
            out += 2 * asked * self.heads * (back + self.down.weight.numel())
        if self.ffn is not None:
            out += 2 * queries * sum(p.numel() for p in self.ffn.parameters() if p.ndim == 2)
        return made + scores + out


class Halves(nn.Module):
    """Every label's vector half from the first and half from the second half of the input."""

    def __init__(self, d_in: int, d_out: int, labels: int):
        super().__init__()
        self.labels = labels
        self.parts = nn.ModuleList(nn.Linear(d_in // 2, d_out // 2 * labels, bias=False) for _ in range(2))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch width"]:
        made = [part(half) for part, half in zip(self.parts, x.chunk(2, -1), strict=True)]
        return torch.cat([half.unflatten(-1, (self.labels, -1)) for half in made], -1).flatten(-2)


class SpreadNorm(nn.Module):
    """`a (z - mean) / (std + 0.001) + b`: a LayerNorm with the unbiased std, and eps added to the std."""

    def __init__(self, width: int):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.a * (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-3) + self.b
