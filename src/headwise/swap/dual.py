"""Two kinds of heads in one layer: some carry what a token holds, others how it compares and which one it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads, fill, merge, split
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places
from headwise.swap.parts.symbols import PositionSymbols, RelativeSymbols, SymbolicAttention, Symbols

SYMBOLS: dict[str, Callable[[int], Symbols]] = {
    "symbolic": SymbolicAttention,
    "position": PositionSymbols,
    "relative": RelativeSymbols,
}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.clone,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class DualAttention(Attention):
    """The last `relational` heads (half of them) put out

        z_i = W_r^h sum_j a_ij r_ij + sum_j a_ij W_s^h s_j,   r_ij,l = act(<W_rq^l x_i, W_rk^l x_j> / sqrt(rd))

    with ordinary weights a; the `relations` numbers r_ij (as many as relational heads; 0 leaves them out) are shared by
    these heads, and rd = head_dim relational / relations. s are `symbols`: "symbolic" (retrieved from a learned
    library), "position", "relative" (of a distance), or a module, which layers may share. The other heads are
    ordinary. Each kind has an output matrix of its own. `symmetric`: W_rk = W_rq. `share_qk`: both kinds have the same
    queries and keys, for equally many heads. Positions turn queries and keys alone, never relations.

    With the identity `sum_j a_ij r_ij` is `<q_i, sum_j a_ij k_j>`: keys of the relations are values beside the symbols,
    in every head, so that a layer is one attention call with wider values. Another `act`, and relative symbols, need
    the weights themselves: they hold [heads, query, key] at once.

    Symbols are made from the layer's own input (after the host's norm, where the authors' code takes the one before).
    In a trained layer the ordinary heads are taken over, with their block of the output matrix: the output at step 0 is
    not equal, unless `relational` is 0.
    """

    paper: ClassVar[Paper] = Paper(
        "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures", "2405.16727"
    )
    what: ClassVar[str] = "heads that carry comparisons and symbols beside heads that carry features"
    context_too: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        relational: int | None = None,
        relations: int | None = None,
        symmetric: bool = False,
        act: Literal["identity", "relu", "tanh", "sigmoid"] = "identity",
        share_qk: bool = False,
        symbols: Literal["symbolic", "position", "relative"] | Symbols = "symbolic",
        **parts: Any,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, **parts)
        group = heads // self.kv_heads
        self.relational = heads // 2 // group * group if relational is None else relational
        self.sensory = heads - self.relational
        self.relations = self.relational if relations is None else relations
        width = self.head_dim * self.relational
        if self.heads * self.head_dim != dim or self.value_dim != self.head_dim:
            raise HeadwiseError(
                f"DualAttention: heads side by side must be dim wide; got {heads} of {self.head_dim}, dim={dim}."
            )
        unsaid = relational is None and not self.relational  # too few key-value heads for half of the heads
        if unsaid or not 0 <= self.relational <= heads or self.relational % group or self.relations < 0:
            raise HeadwiseError(
                f"DualAttention: relational must be 0 to {heads}, a multiple of {group}, relations not negative; got "
                f"{relational}, {relations}."
            )
        if self.relations and width % self.relations:
            raise HeadwiseError(
                f"DualAttention: relations must divide head_dim * relational = {width}; got {self.relations}."
            )
        if share_qk and self.sensory != self.relational:
            raise HeadwiseError(
                f"DualAttention: share_qk wants equally many heads of both kinds; got {self.sensory}, "
                f"{self.relational}."
            )
        if act not in ACTS or not (isinstance(symbols, Symbols) or symbols in SYMBOLS):
            raise HeadwiseError(
                f"DualAttention: act is one of {', '.join(ACTS)}, symbols one of {', '.join(SYMBOLS)} or a module; got "
                f"{act!r}, {symbols!r}."
            )
        self.act, self.share_qk = act, share_qk
        if not self.relational:
            return
        bias, own = self.q_proj.bias is not None, self.head_dim * self.sensory
        shown = self.relational // group
        del self.v_proj, self.o_proj  # by these names one looks for a projection of every head
        self.sensory_v: nn.Module = nn.Linear(dim, own // group, bias) if own else nn.Identity()
        self.sensory_out: nn.Module = nn.Linear(own, own, bias) if own else nn.Identity()
        if share_qk:
            self.q_proj, self.k_proj = nn.Linear(dim, own, bias), nn.Linear(dim, own // group, bias)
        self.symbols = SYMBOLS[symbols](dim) if isinstance(symbols, str) else symbols
        self.s_proj = nn.Linear(dim, shown * self.head_dim, bias)
        self.so_proj: nn.Module = nn.Linear(width, width, bias)
        if self.relations:
            self.rq_proj = nn.Linear(dim, width, bias)
            self.rk_proj = self.rq_proj if symmetric else nn.Linear(dim, width, bias)
            self.r_out = nn.Parameter(torch.empty(self.relational, self.head_dim, self.relations))
            for part in self.r_out.detach():
                nn.init.kaiming_uniform_(part, a=math.sqrt(5))

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        if context is not None:
            raise HeadwiseError("DualAttention compares tokens of one sequence: leave out context.")
        if not self.relational:
            return super().forward(x, mask=mask, positions=positions, cache=cache)
        entries = self.entries(cache, context)
        here, seen = self.places(x, positions, entries), self.visible(mask, len(x))
        q, k, v = self.project(x, x, here)
        asking = comparing = None
        if self.relations:
            asking = split(self.rq_proj(x), self.relations)
            comparing = asking if self.rk_proj is self.rq_proj else split(self.rk_proj(x), self.relations)
        if entries is not None:
            k, v = self.remember(entries, k, v)
            if comparing is not None:
                (comparing,) = entries.extend(comparing=comparing)
            entries.length += x.shape[1]
        z = self.attend(q, k, self.widened(v, comparing), seen, here)
        own = z[:, : self.sensory, :, : self.head_dim]
        shown, rest = z[:, self.sensory :].tensor_split((self.head_dim,), -1)
        if self.symbols.relative:
            shown = self.by_distance(rest, here)
        if asking is not None and comparing is not None:
            if self.by_weights:
                met = torch.einsum("bhij,blij->bhil", rest, self.compare(asking, comparing))
            else:
                met = torch.einsum("bhild,blid->bhil", rest.unflatten(-1, (self.relations, -1)), asking)
                met = met * asking.shape[-1] ** -0.5
            shown = shown + torch.einsum("bhil,hdl->bhid", met, self.r_out)
        return torch.cat([self.sensory_out(merge(own)), self.so_proj(merge(shown))], -1)

    @property
    def by_weights(self) -> bool:
        """Whether the output needs the weights themselves, which come out where the values are names of the keys."""
        return self.symbols.relative or (self.act != "identity" and self.relations > 0)

    def project(
        self,
        x: Float[Tensor, "batch query dim"],
        source: Float[Tensor, "batch key dim"],
        here: Places,
        crossed: bool = False,
    ) -> tuple[Heads, Heads, Heads]:
        if not self.relational:
            return super().project(x, source, here, crossed)
        times, shown = (2 if self.share_qk else 1), self.relational * self.kv_heads // self.heads
        q = self.q_norm(split(self.q_proj(x), self.heads // times))
        k = self.k_norm(split(self.k_proj(x), self.kv_heads // times))
        q, k = (self.position.turn(part, here).repeat(1, times, 1, 1) for part in (q, k))
        if self.symbols.relative:
            symbols = x.new_zeros(len(x), shown, x.shape[1], self.head_dim)
        else:
            symbols = split(self.s_proj(self.symbols(x, here)), shown).expand(len(x), -1, -1, -1)
        if not self.sensory:
            return q, k, symbols
        return q, k, torch.cat([split(self.sensory_v(x), self.kv_heads - shown), symbols], 1)

    def widened(self, v: Heads, comparing: Heads | None) -> Heads:
        """Values with the keys of the relations beside them, or with names of the keys."""
        if self.by_weights:
            beside = torch.eye(v.shape[2], dtype=v.dtype, device=v.device)
        elif comparing is not None:
            beside = merge(comparing)[:, None]
        else:
            return v
        return torch.cat([v, beside.expand(*v.shape[:2], -1, -1)], -1)

    def compare(self, asking: Heads, comparing: Heads) -> Float[Tensor, "batch relation query key"]:
        return ACTS[self.act](asking @ comparing.mT * asking.shape[-1] ** -0.5)

    def by_distance(self, weights: Float[Tensor, "batch heads query key"], here: Places) -> Heads:
        """`sum_j a_ij W_s s_(j-i)`: the weight of every distance, times what its symbol gives."""
        i = torch.arange(here.first, here.first + weights.shape[2], device=weights.device)
        index = self.symbols.index(i, torch.arange(weights.shape[3], device=weights.device))
        table = self.symbols.table
        share = weights.new_zeros(*weights.shape[:3], len(table)).scatter_add(-1, index.expand_as(weights), weights)
        values = self.s_proj(table).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        return share @ values.repeat_interleave(self.heads // self.kv_heads, 0)

    def relation_map(self, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch query key relation"]:
        """All relations r_ij of an input."""
        if not self.relations:
            raise HeadwiseError("relation_map: this layer has relations=0.")
        both = (split(linear(x), self.relations) for linear in (self.rq_proj, self.rk_proj))
        return self.compare(*both).movedim(1, -1)

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        if not self.relational:
            return super().flops(queries, keys)
        own = [m for name, m in self.named_modules() if isinstance(m, nn.Linear) and not name.startswith("symbols")]
        wide = self.head_dim * self.relational if self.relations else 0
        beside = keys if self.by_weights else wide
        met = queries * self.relational * wide
        if self.by_weights:
            met = queries * keys * (wide + self.relational * self.relations)
        if self.relations:
            met += queries * self.r_out.numel()
        if self.symbols.relative:  # these are projected by distance, not by token
            distances = len(self.symbols.table)
            met += (distances - queries) * self.s_proj.weight.numel()
            met += queries * distances * self.relational * self.head_dim
        return (
            sum(2 * queries * m.in_features * m.out_features for m in own)
            + self.symbols.flops(queries)
            + self.score.flops(queries, keys, self.heads, self.head_dim)
            + 2 * queries * keys * self.heads * (self.head_dim + beside)
            + 2 * met
        )

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        plain = Attention.from_site(site, causal, position=own.pop("position", None))
        biased = plain.q_proj.bias is not None
        made = cls(
            plain.dim, site.heads, site.kv_heads, site.head_dim,
            causal=causal, bias=biased, position=plain.position, **own,
        )  # fmt: skip
        made.to(site.W_Q.dtype).to(site.W_Q.device)
        made.scale, made.q_norm, made.k_norm = plain.scale, plain.q_norm, plain.k_norm
        if not made.relational:
            made.q_proj, made.k_proj, made.v_proj, made.o_proj = plain.q_proj, plain.k_proj, plain.v_proj, plain.o_proj
            return made
        pairs = (plain.q_proj, made.q_proj), (plain.k_proj, made.k_proj), (plain.v_proj, made.sensory_v)
        for old, new in pairs:  # the first heads are the ordinary ones
            if isinstance(new, nn.Linear):
                fill(new, old.weight[: new.out_features], None if old.bias is None else old.bias[: new.out_features])
        if not isinstance(plain.o_proj, nn.Linear):
            made.sensory_out, made.so_proj = nn.Identity(), nn.Identity()  # the host has it outside the layer
            return made
        cut = made.sensory * made.head_dim
        for new, part in ((made.sensory_out, slice(cut)), (made.so_proj, slice(cut, None))):
            if isinstance(new, nn.Linear):
                bias = plain.o_proj.bias
                fill(new, plain.o_proj.weight[part, part], None if bias is None else bias[part])
        return made
