"""One query, one key and one value projection for all heads, which small vectors tell apart.

    add:  q_i = Q + e_i^Q          k_i = K + e_i^K          v_i = V + e_i^V
    mul:  q_i = Q o (1 + e_i^Q)    k_i = K o (1 + e_i^K)    v_i = V o (1 + e_i^V)

Where positions don't turn keys, neither needs keys and values of more than one head. With add, what e^K gives is the
same for all keys and cancels in the softmax, e^V is a constant of the output, and heads differ by `K e_i^Q`, a bias of
keys. With mul, e^K moves to the queries and e^V to the output.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads, fill
from headwise.swap.cache import Cache, Entries
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places, Position


class HeadEmbeddingAttention(Attention):
    """MHE attention, `mode` "mul" (MHE-MUL) or "add" (MHE-ADD): `3 d p + 3 H p` parameters for queries, keys and values
    of H heads of width p, instead of `3 d H p`. W_O keeps its size. The cache holds one key and one value a token.

    Embeddings start from a normal distribution of standard deviation `init_std`: at 0 all heads would be one. Leave
    them out of weight decay, which makes the heads alike. They act before a rotation, so that with rotary positions
    e^K of add has an effect (without, it gets no gradient); `qk_norm` acts on the shared queries and keys, before them.
    """

    paper: ClassVar[Paper] = Paper(
        "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention",
        "2310.07911",
    )
    what: ClassVar[str] = "one projection for all heads, told apart by head embeddings"

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        mode: Literal["mul", "add"] = "mul", bias: bool = False, init_std: float = 0.02, **own: Any,
    ):  # fmt: skip
        if kv_heads not in (None, 1):
            raise HeadwiseError(f"HeadEmbeddingAttention: all heads share one key and value; got kv_heads={kv_heads}.")
        if mode not in ("mul", "add"):
            raise HeadwiseError(f"mode: wanted mul or add; got {mode!r}.")
        super().__init__(dim, heads, 1, head_dim, bias=bias, **own)
        self.mode = mode
        self.shared_q = nn.Linear(dim, self.head_dim, bias)
        self.shared_k, self.shared_v = self.k_proj, self.v_proj
        del self.q_proj, self.k_proj, self.v_proj  # by these names one looks for a projection of every head
        self.q_embed, self.k_embed = (nn.Parameter(init_std * torch.randn(heads, self.head_dim)) for _ in "qk")
        self.v_embed = nn.Parameter(init_std * torch.randn(heads, self.value_dim))

    @property
    def turns(self) -> bool:
        """Whether keys are turned by their positions."""
        return type(self.position).turn is not Position.turn

    @property
    def folds(self) -> bool:
        """Whether one head of keys and values does for all, by the algebra above."""
        return not self.turns and self.score.plain and self.normaliser.softmax

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        entries = self.entries(cache, context)
        here = there = self.places(x, positions, entries)
        source = x if context is None else context
        if context is not None:
            there = Places(torch.arange(context.shape[1], device=x.device)[None])
        q = self.position.turn(self.told(self.q_norm(self.shared_q(x))[:, None], self.q_embed), here)
        k, v = self.k_norm(self.shared_k(source))[:, None], self.shared_v(source)[:, None]
        if entries is not None:
            k, v, there = self.keep(entries, k, v, there)
        seen = self.visible(mask, len(x))
        if self.folds:
            mul = self.mode == "mul"
            z = self.attend(self.told(q, self.k_embed) if mul else q, k, v, seen, here)
            return self.combine(self.told(z, self.v_embed), x)
        k = self.position.turn(self.told(k, self.k_embed), there)
        return self.combine(self.attend(q, k, self.told(v, self.v_embed), seen, here), x)

    def told(self, shared: Float[Tensor, "batch #heads token dim"], embedding: Float[Tensor, "heads dim"]) -> Heads:
        """Every head's own of what they share."""
        own = embedding[:, None].to(shared.dtype)
        return shared * (1 + own) if self.mode == "mul" else shared + own

    def keep(self, entries: Entries, k: Heads, v: Heads, here: Places) -> tuple[Heads, Heads, Places]:
        """Keys and values of all tokens so far, neither told apart nor turned, and where they are."""
        where: dict[str, Tensor] = {}
        if self.turns:
            where["ids"] = here.ids[..., None]
            if here.cos_sin is not None:
                where["cos"], where["sin"] = here.cos_sin
        where = {name: x.expand(len(k), -1, -1) for name, x in where.items()}
        k, v, *found = entries.extend(k=k, v=v, **where)
        entries.length += here.ids.shape[-1]
        if not self.turns:
            return k, v, here
        return k, v, Places(found[0][..., 0], 0, (found[1], found[2]) if len(found) > 1 else None)

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        p, out = self.head_dim, self.value_dim
        projections = 2 * self.dim * (queries * p + keys * (p + out) + queries * self.heads * out)
        scores = self.score.flops(queries, keys, self.heads, p)
        return projections + scores + 2 * queries * keys * self.heads * out

    @classmethod
    def from_site(
        cls, site: Site, causal: bool, mode: Literal["mul", "add"] = "mul", init: Literal["mean", "svd"] = "mean",
        **own: Any,
    ) -> Self:  # fmt: skip
        """Fitted to the weights of a trained layer, as `from_mha` does. The output is not equal at the start."""
        return cls.from_mha(Attention.from_site(site, causal, **own), mode, init)

    @classmethod
    def from_mha(
        cls, attention: Attention, mode: Literal["mul", "add"] = "mul", init: Literal["mean", "svd"] = "mean",
        inputs: Float[Tensor, "*row dim"] | None = None,
    ) -> Self:  # fmt: skip
        """Fitted to a trained layer, to be tuned on. The shared weights are the mean over heads ("mean"), the
        embeddings by least squares over `inputs` of the layer (None: as if they were white). "svd", for mul: for every
        dim of a head the best single column with a factor for each head, which lies nearer than the mean."""
        if mode not in ("mul", "add") or init not in ("mean", "svd") or (init, mode) == ("svd", "add"):
            raise HeadwiseError(f"mode, init: wanted mul with mean or svd, or add with mean; got {mode!r}, {init!r}.")
        made = cls(
            attention.dim, attention.heads, head_dim=attention.head_dim, value_dim=attention.value_dim,
            causal=attention.causal, mode=mode,
            **{name: deepcopy(getattr(attention, name)) for name in ("score", "normaliser", "position")},
        )  # fmt: skip
        gram, mean = moments(attention, inputs)
        for name in "qkv":
            linear: nn.Linear = getattr(attention, f"{name}_proj")
            rows = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)
            heads = rows.detach().double().unflatten(0, (attention.heads if name == "q" else attention.kv_heads, -1))
            heads = heads.repeat_interleave(attention.heads // len(heads), 0)
            size = heads.shape[-1]
            shared, embedding = fit(heads, gram[:size, :size], mean[:size], mode, init)
            shared, embedding = shared.to(rows.dtype), embedding.to(rows.dtype)
            bias = None if linear.bias is None else shared[:, -1]
            fill(getattr(made, f"shared_{name}"), shared[:, : attention.dim], bias)
            setattr(made, f"{name}_embed", nn.Parameter(embedding))
        made.to(linear.weight.device)
        for name in ("o_proj", "q_norm", "k_norm"):
            setattr(made, name, deepcopy(getattr(attention, name)))
        made.scale = attention.scale
        return made


def moments(attention: Attention, inputs: Tensor | None) -> tuple[Float[Tensor, "d1 d1"], Float[Tensor, " d1"]]:
    """Second moments and mean of a layer's inputs with a 1 for the bias at the end."""
    dim, device = attention.dim, attention.v_proj.weight.device
    if inputs is None:
        return torch.eye(dim + 1, dtype=torch.float64, device=device), torch.eye(
            dim + 1, dtype=torch.float64, device=device
        )[-1]
    if inputs.shape[-1] != dim:
        raise HeadwiseError(f"inputs: wanted rows of {dim} numbers; got shape {tuple(inputs.shape)}.")
    x = nn.functional.pad(inputs.detach().double().flatten(0, -2), (0, 1), value=1.0)
    return x.T @ x / len(x), x.mean(0)


def fit(
    heads: Float[Tensor, "heads dim inputs"],
    gram: Float[Tensor, "inputs inputs"],
    mean: Float[Tensor, " inputs"],
    mode: str,
    init: str,
) -> tuple[Float[Tensor, "dim inputs"], Float[Tensor, "heads dim"]]:
    """Shared rows and head embeddings nearest to the rows of all heads."""
    if init == "svd":
        columns = heads.transpose(0, 1)
        _, vectors = torch.linalg.eigh(columns @ gram @ columns.mT)
        factors = vectors[..., -1] * len(heads) ** 0.5
        factors = factors * torch.where(factors.sum(-1, keepdim=True) < 0, -1.0, 1.0)
        return (factors[..., None] * columns).mean(1), factors.T - 1
    shared = heads.mean(0)
    if mode == "add":
        return shared, (heads - shared) @ mean
    weighted = shared @ gram
    return shared, (heads * weighted).sum(-1) / (shared * weighted).sum(-1).clamp(min=1e-30) - 1
