"""The contract of the room: what every mechanism is made with, called with, and says about itself."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.cache import Cache, Entries
from headwise.swap.parts.positions import Places, Position

Visible = Bool[Tensor, "batch key"] | Bool[Tensor, "#batch #heads query key"] | Mask | None
"""Which keys a query may see, True = visible: padding by keys, any set of pairs, or a mask of the core; None = all.
A causal mechanism adds its own condition to the first two."""


class Mechanism(nn.Module):
    """Base of all mechanisms: `Mechanism(dim, heads, kv_heads=None, head_dim=None, *, causal=False, **own)`, and

        y = mechanism(x, context=None, mask=None, positions=None, cache=None)

    x [batch, token, dim] -> y [batch, token, dim]. With `context` queries come from x and keys from the context. With
    `cache` x continues what the cache has seen, and y equals the last rows of the full pass. `aux_loss` is what the
    last forward asks to be added to the loss (None where a mechanism has none).
    """

    paper: ClassVar[Paper] = Paper("", "")
    what: ClassVar[str] = ""
    """One line for lists."""
    causal_too: ClassVar[bool] = True
    """Whether there is a causal form."""
    context_too: ClassVar[bool] = True
    """Whether it can attend to another sequence."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *, causal: bool = False
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        name = type(self).__name__
        if dim < 1 or heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise HeadwiseError(
                f"{name}: wanted positive numbers, heads a multiple of kv_heads; got dim={dim}, heads={heads}, "
                f"kv_heads={kv_heads}."
            )
        if head_dim is not None and head_dim < 1:
            raise HeadwiseError(f"{name}: head_dim must be at least 1; got {head_dim}.")
        if head_dim is None and dim % heads:
            raise HeadwiseError(f"{name}: dim {dim} is no multiple of {heads} heads: give head_dim.")
        if causal and not self.causal_too:
            raise HeadwiseError(f"{name} has no causal form: every output needs all tokens.")
        self.dim, self.heads, self.kv_heads, self.causal = dim, heads, kv_heads, causal
        self.head_dim = head_dim or dim // heads
        self.aux_loss: Tensor | None = None

    def train(self, mode: bool = True) -> Self:
        self.aux_loss = None  # it holds the graph of the last step, with which a module can't be copied
        return super().train(mode)

    @classmethod
    def key(cls) -> str:
        """The name in lists and on the command line: the class's, in small letters with underscores."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @classmethod
    def host_parts(cls, position: Position) -> dict[str, Any]:
        """What a mechanism takes over from a host model beside weights: by default nothing."""
        return {}

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        """This mechanism in the place of a layer. By default of its sizes and with fresh weights."""
        made = cls(site.W_Q.shape[1], site.heads, site.kv_heads, site.head_dim, causal=causal, **own)
        return made.to(site.W_Q.dtype).to(site.W_Q.device)

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        raise TypeError(f"{type(self).__name__} must define forward.")

    def flops(self, queries: int, keys: int | None = None) -> int:
        """Floating-point operations of one forward of one sequence (a multiply-add counts two)."""
        raise TypeError(f"{type(self).__name__} must define flops.")

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def entries(self, cache: Cache | None, context: Tensor | None) -> Entries | None:
        """What this module keeps in a cache; None without one, and for a context, which is there as a whole."""
        if cache is None:
            return None
        if context is not None:
            raise HeadwiseError(f"{type(self).__name__}: a context is there as a whole: leave out cache.")
        if not self.causal:
            raise HeadwiseError(f"{type(self).__name__}: a cache is for causal mechanisms: make it with causal=True.")
        return cache.of(self)

    def places(self, x: Tensor, positions: Tensor | Places | None, entries: Entries | None) -> Places:
        """Where the tokens of x are: as told, else after what the cache holds."""
        if isinstance(positions, Places):
            return positions
        first = 0 if entries is None else entries.length
        if positions is None:
            positions = torch.arange(first, first + x.shape[1], device=x.device)[None]
        return Places(positions if positions.ndim == 2 else positions[None], first)

    def visible(self, mask: Visible, batch: int) -> Mask:
        """A mask in any of its forms, with the causal condition in it."""
        if isinstance(mask, Mask):
            return mask
        right = 0 if self.causal else None
        if mask is None:
            return Mask(right=right, batch=batch)
        if mask.dtype != torch.bool or mask.ndim not in (2, 4):
            raise HeadwiseError(
                f"{type(self).__name__}: mask wants bools (True = visible) of shape [batch, key] or [batch, heads, "
                f"query, key]; got {mask.dtype} of shape {tuple(mask.shape)}."
            )
        if mask.ndim == 2:
            return Mask(right=right, key_valid=mask, batch=batch)
        return Mask(right=right, allowed=mask, batch=batch)


def aux_loss(model: nn.Module) -> Float[Tensor, ""] | None:
    """The sum of what the mechanisms of a model ask to be added to its loss; None where none does. Reentrant gradient
    checkpointing, which isn't the default of transformers, leaves it without a gradient."""
    asked = [m.aux_loss for m in model.modules() if isinstance(m, Mechanism) and m.aux_loss is not None]
    return torch.stack(asked).sum() if asked else None
