"""Attention with fewer projections: values, then keys too, are a head's own channels of the input."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads, fill
from headwise.swap.cache import Entries
from headwise.swap.parts.positions import Position


class OptimisedAttention(Attention):
    """`z_i = softmax(q k^T / sqrt(D)) x_i`, x_i [token, D] the input's channels iD to (i+1)D: no W_V, 3 dim^2
    parameters. Grouped heads and heads of another width than dim / heads have no such channels.

    In a trained model the output starts from the best fit of `W_V^i W_O^i` by the rows of W_O that head i has, which is
    exact for one head only: with several heads the output at step 0 is not equal, and the model must be trained on.
    """

    paper: ClassVar[Paper] = Paper("You Need to Pay Better Attention", "2403.01643")
    what: ClassVar[str] = "values are the input's own channels: three quarters of the parameters"
    own_keys: ClassVar[bool] = False
    """Whether keys are the input's channels as well."""

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, **parts: Any):
        super().__init__(dim, heads, kv_heads, head_dim, **parts)
        if self.kv_heads != heads or self.heads * self.head_dim != dim or self.value_dim != self.head_dim:
            raise HeadwiseError(
                f"{type(self).__name__}: every head has its own dim / heads channels of the input; got dim={dim}, "
                f"heads={heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}."
            )
        self.v_proj = nn.Identity()  # type: ignore[assignment]
        if self.own_keys:
            self.k_proj = nn.Identity()  # type: ignore[assignment]

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        left_out = 2 * keys * self.dim**2 * (2 if self.own_keys else 1)
        return super().flops(queries, keys) - left_out

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        plain = Attention.from_site(site, causal, position=own.pop("position", None))
        if not isinstance(plain.o_proj, nn.Linear):
            raise HeadwiseError(f"{cls.__name__}: {site.name} has its output matrix outside, which takes in W_V.")
        normed = any(not isinstance(norm, nn.Identity) for norm in (plain.q_norm, plain.k_norm))
        if cls.own_keys and normed:
            raise HeadwiseError(f"{cls.__name__}: {site.name} norms its keys, which the input's channels have not.")
        made = cls(plain.dim, site.heads, None, site.head_dim, causal=causal, position=plain.position, **own)
        made.to(site.W_Q.dtype).to(site.W_Q.device)
        made.q_norm, made.k_norm, made.scale = plain.q_norm, plain.k_norm, plain.scale
        group = site.heads // site.kv_heads
        W_Q, W_K, W_V = site.W_Q, site.W_K.repeat_interleave(group, 0), site.W_V.repeat_interleave(group, 0)
        output = W_V @ site.W_O  # [head, dim, dim]
        out_bias: Tensor | None = plain.o_proj.bias
        if site.b_V is not None:  # weights sum to 1, so that a value's bias is one of the output
            shift = torch.einsum("hv,hvd->d", site.b_V.repeat_interleave(group, 0), site.W_O)
            out_bias = shift if out_bias is None else out_bias + shift
        assert isinstance(made.o_proj, nn.Linear)
        with torch.no_grad():
            fill(made.o_proj, own_rows(output).flatten(0, 1).T, out_bias)
            if isinstance(made.k_proj, nn.Linear):
                made.q_proj = plain.q_proj
                b_K = None if site.b_K is None else site.b_K.repeat_interleave(group, 0).flatten()
                fill(made.k_proj, W_K.transpose(1, 2).flatten(0, 1), b_K)
                return made
            # a key's bias adds the same to all scores of a row
            bias = None if site.b_Q is None else own_rows(W_K @ site.b_Q[..., None])[..., 0].flatten()
            fill(made.q_proj, own_rows(W_K @ W_Q.mT).flatten(0, 1), bias)
        return made


class EfficientAttention(OptimisedAttention):
    """`z_i = softmax(q x_i^T / sqrt(D)) x_i`: no W_V and no W_K, 2 dim^2 parameters, and a cache of one tensor (two
    where positions turn the keys). With one head nothing is lost: `W_Q W_K^T` and `W_V W_O` are one matrix each. With
    several, a head sees no more than its own channels of the keys and values.

    In a trained model queries start from the best fit of `W_Q^i W_K^i^T`, and positions that turn keys are left out of
    that fit: the output at step 0 is equal for one head without them. Not the method of linear cost of the same name.
    """

    what: ClassVar[str] = "keys and values are the input's own channels: half of the parameters"
    own_keys: ClassVar[bool] = True

    @property
    def turns(self) -> bool:
        """Whether keys differ from values."""
        return type(self.position).turn is not Position.turn or not isinstance(self.k_norm, nn.Identity)

    def remember(self, entries: Entries, k: Heads, v: Heads) -> tuple[Heads, ...]:
        if self.turns:
            return super().remember(entries, k, v)
        (x,) = entries.extend(v=v)
        return x, x


def own_rows(matrix: Float[Tensor, "heads dim width"]) -> Float[Tensor, "heads head_dim width"]:
    """Of head i rows iD to (i+1)D."""
    each = torch.arange(len(matrix), device=matrix.device)
    return matrix.unflatten(1, (len(matrix), -1))[each, each]
