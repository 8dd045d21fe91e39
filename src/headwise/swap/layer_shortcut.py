"""A layer that attends over the outputs of all earlier layers, at all earlier places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attention.dense import BLOCKED
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads, split
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places, Position

Map = Literal["mlp", "linear", "identity"]


class LayerShortcutAttention(Attention):
    """`layer(states)` with states [batch, token, state, dim], the outputs of earlier layers, the last one asking:

        f_l = map_l(norm_l(h^(l))),   q = W_Q norm(h^(last)),   keys and values from f_l at (l, s), l in depths, s <= t

    with one softmax over depths and places together. `depths`: numbers of the states (from 0; -1 the last), 1 or more.
    `map`: two linear layers with GELU, one, or none, each depth its own. `same_position`: s = t only, so that depths
    compete but places don't. `depth_embedding`: a learned vector of each depth is added to f. Norms are each depth's
    own, as sizes differ much by depth. Rotary positions count places, for all depths alike. With the last state alone,
    the identity map and equal norms, it is ordinary self-attention. Causal; a cache holds every depth.
    """

    paper: ClassVar[Paper] = Paper("Adaptive Large Language Models By Layerwise Attention Shortcuts", "2409.10870")
    what: ClassVar[str] = "attention over the outputs of all earlier layers"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        depths: Sequence[int],
        map: Map = "mlp",
        same_position: bool = False,
        depth_embedding: bool = False,
        position: Position | None = None,
        **parts: Any,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, causal=True, position=position, **parts)
        if not depths or len(set(depths)) < len(depths):
            raise HeadwiseError(f"LayerShortcutAttention: depths wants different numbers of states; got {depths!r}.")
        if map not in ("mlp", "linear", "identity"):
            raise HeadwiseError(f"LayerShortcutAttention: map is mlp, linear or identity; got {map!r}.")
        if type(self.position).bias is not Position.bias:
            raise HeadwiseError("LayerShortcutAttention: keys stand once for each depth: Alibi can't count them.")
        self.depths, self.same_position = tuple(depths), same_position
        made = {
            "mlp": lambda: nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)),
            "linear": lambda: nn.Linear(dim, dim),
            "identity": nn.Identity,
        }
        self.maps = nn.ModuleList(made[map]() for _ in depths)
        self.norm: nn.Module = nn.RMSNorm(dim, eps=1e-6)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in depths)
        self.depth = nn.Parameter(torch.zeros(len(depths), dim)) if depth_embedding else None

    def features(self, states: Float[Tensor, "batch token state dim"]) -> Float[Tensor, "batch token depth dim"]:
        """What is read of each depth."""
        try:
            chosen = [states[:, :, depth] for depth in self.depths]
        except IndexError:
            raise HeadwiseError(
                f"LayerShortcutAttention: depths {self.depths} want more states than the {states.shape[2]} given."
            ) from None
        parts = [f(norm(h)) for f, norm, h in zip(self.maps, self.norms, chosen, strict=True)]
        read = torch.stack(parts, 2)
        return read if self.depth is None else read + self.depth

    def forward(  # type: ignore[override]
        self,
        states: Float[Tensor, "batch token state dim"],
        mask: Visible = None,
        positions: Int[Tensor, "#batch token"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        q, k, v, seen, here = self.prepared(states, mask, positions, cache)
        return self.combine(self.attend(q, k, v, seen, here), states[:, :, -1])

    def depth_usage(
        self,
        states: Float[Tensor, "batch token state dim"],
        mask: Visible = None,
        positions: Int[Tensor, "#batch token"] | Places | None = None,
    ) -> Float[Tensor, "batch heads token depth"]:
        """The attention of every head and token to each depth, all places together."""
        q, k, _, seen, here = self.prepared(states, mask, positions, None)
        names = torch.eye(len(self.depths), dtype=k.dtype, device=k.device).repeat(states.shape[1], 1)
        return self.attend(q, k, names.expand(*k.shape[:2], -1, -1), seen, here)

    def prepared(
        self, states: Tensor, mask: Visible, positions: Tensor | Places | None, cache: Cache | None
    ) -> tuple[Heads, Heads, Heads, Mask, Places]:
        """Queries, and keys and values in the order of places, those of one place in the order of depths."""
        if states.ndim != 4:
            raise HeadwiseError(
                f"LayerShortcutAttention wants states [batch, token, state, dim]; got {tuple(states.shape)}."
            )
        m, entries = len(self.depths), self.entries(cache, None)
        here = self.places(states[:, :, -1], positions, entries)
        read = self.features(states).flatten(1, 2)
        q = self.position.turn(self.q_norm(split(self.q_proj(self.norm(states[:, :, -1])), self.heads)), here)
        angles = here.cos_sin and tuple(part.repeat_interleave(m, -2) for part in here.cos_sin)
        there = Places(here.ids.repeat_interleave(m, 1), here.first, angles)  # type: ignore[arg-type]
        k = self.position.turn(self.raw_keys(read), there)
        v = split(self.v_proj(read), self.kv_heads)
        if entries is not None:  # all depths of a place are one entry, so that a cache counts tokens
            kept = self.remember(entries, *(part.unflatten(2, (-1, m)).flatten(3) for part in (k, v)))
            k, v = (part.unflatten(-1, (m, -1)).flatten(2, 3) for part in kept)
            entries.length += states.shape[1]
        return q, k, v, self.tiled(self.visible(mask, len(states)), k.shape[2], here), here

    def tiled(self, mask: Mask, keys: int, here: Places) -> Mask:
        """A mask over places as one over places and depths."""
        m, length, device = len(self.depths), keys // len(self.depths), here.ids.device
        i, j = torch.arange(here.first, length, device=device), torch.arange(length, device=device)
        seen = mask.dense(i, 0, length)
        if mask.added is not None:
            seen = seen & (mask.added > BLOCKED)
        if self.same_position:
            seen = seen & (i[:, None] == j)
        return Mask(allowed=seen.repeat_interleave(m, -1), batch=mask.batch)

    def flops(self, queries: int, keys: int | None = None) -> int:
        m = len(self.depths)
        keys = queries if keys is None else keys
        mapped = sum(f.in_features * f.out_features for f in self.maps.modules() if isinstance(f, nn.Linear))
        return super().flops(queries, m * keys) + 2 * keys * mapped

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        """With the weights of a layer of a trained decoder, for states of that decoder."""
        plain = Attention.from_site(site, causal, position=own.pop("position", None))
        made = cls(plain.dim, site.heads, site.kv_heads, site.head_dim, value_dim=site.value_dim,
                   position=plain.position, **own)  # fmt: skip
        made.to(site.W_Q.dtype).to(site.W_Q.device)
        made.scale, made.q_norm, made.k_norm = plain.scale, plain.q_norm, plain.k_norm
        made.q_proj, made.k_proj, made.v_proj, made.o_proj = plain.q_proj, plain.k_proj, plain.v_proj, plain.o_proj
        return made
