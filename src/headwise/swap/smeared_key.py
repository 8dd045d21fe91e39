"""Keys that hold a part of the key before them: what lets a single layer form induction heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places


class SmearedKey(Attention):
    """`k'_j = s k_j + (1 - s) k_{j-1}`, `s = sigmoid(alpha)`, one alpha a key-value head, starting at `smear`; before a
    rotation turns the keys. The first token keeps its key, and so does one that may not see the token before it
    (padding, packed documents).

    Of any other attention too: `class SmearedSigmoid(SmearedKey, SigmoidAttention): ...`. A start of 2
    is s = 0.88, near plain attention. In a trained layer the output at step 0 is equal only for a large
    start (`smear=20`), from where little is learned: the gradient is times s (1 - s). A cache holds the last token's
    key as it was beside the keys, and can't be turned back.
    """

    paper: ClassVar[Paper] = Paper("In-context Learning and Induction Heads", "2209.11895")
    what: ClassVar[str] = "keys mixed with the key before them, by a learned share"
    context_too: ClassVar[bool] = False

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        smear: float = 2.0, **own: Any,
    ):  # fmt: skip
        super().__init__(dim, heads, kv_heads, head_dim, **own)
        self.alpha = nn.Parameter(torch.full((self.kv_heads, 1, 1), float(smear)))
        self._before: Heads | None = None
        """The key before the first of this forward; then the last of this forward, unsmeared."""
        self._joined: Bool[Tensor, "#batch one token one"] | None = None
        """The tokens of this forward that may see the token before them."""

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        if context is not None:
            raise HeadwiseError("SmearedKey: keys are smeared within the sequence that asks: leave out context.")
        entries = self.entries(cache, None)
        here, mask = self.places(x, positions, entries), self.visible(mask, len(x))
        self._before = None if entries is None else entries.states.get("before")
        self._joined = joined(mask, here.first, x)
        y = super().forward(x, mask=mask, positions=here, cache=cache)
        last, self._before, self._joined = self._before, None, None
        if last is None:
            raise HeadwiseError(f"{type(self).__name__} makes its keys in a way of its own: they can't be smeared.")
        if entries is not None:
            entries.put(before=last)
        return y

    def raw_keys(self, source: Float[Tensor, "batch key dim"]) -> Heads:
        keys = super().raw_keys(source)
        before = torch.cat([keys[:, :, :1] if self._before is None else self._before, keys[:, :, :-1]], 2)
        self._before = keys[:, :, -1:]
        assert self._joined is not None
        return torch.where(self._joined, torch.lerp(before, keys, torch.sigmoid(self.alpha).to(keys)), keys)


def joined(mask: Mask, first: int, x: Float[Tensor, "batch token dim"]) -> Bool[Tensor, "#batch one token one"]:
    """Which tokens may see the one before them; the first of all may not."""
    i = torch.arange(first, first + x.shape[1], device=x.device)
    before = (i - 1).clamp(min=0).expand(len(x), -1)[..., None]
    seen = mask.at(i, slice(None), before, 0)
    if mask.added is not None:
        added = mask.added.expand(len(x), -1, x.shape[1], -1)
        seen = seen & (added.gather(3, before[:, None].expand(-1, added.shape[1], -1, -1)) > -1e29)
    return seen.all(1, keepdim=True) & (i > 0)[:, None]
