"""Rotary positions, turned again: what `Rebase` needs to know of a model's own rotation."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attention.call import AttentionCall, expand_kv
from headwise.attention.edits import Rebase
from headwise.attention.once import on
from headwise.errors import HeadwiseError

GROWING = ("dynamic", "longrope")
"""Kinds of scaling whose frequencies depend on how long the text is by now."""


@dataclass(frozen=True)
class Rotary:
    """Frequencies of a model's rotation, and whether it turns pairs (x_i, x_i+d/2) or neighbours (x_2i, x_2i+1)."""

    inv_freq: Float[Tensor, " half"]
    interleaved: bool
    module: Any = None
    """The model's own rotary module, which knows its base and scaling."""
    _kept: dict[Rebase, tuple[tuple, Turns, Turns]] = field(default_factory=dict, repr=False, compare=False)
    _bases: dict[Rebase, Float[Tensor, "base half"]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def settings(self) -> dict:
        """What the model's config says of its rotation; empty where it says nothing."""
        known = getattr(getattr(self.module, "config", None), "rope_parameters", None)
        return known if isinstance(known, dict) and "rope_theta" in known else {}

    @property
    def base(self) -> float:
        """The model's own base; without a config that names it, read off the frequencies."""
        if self.settings:
            return float(self.settings["rope_theta"])
        return float(self.inv_freq[1].double() ** -len(self.inv_freq))

    def frequencies(self, theta: float) -> Float[Tensor, " half"]:
        """The frequencies with another base, put in before the model's scaling; with its own base bit for bit its
        own."""
        settings = self.settings
        kind = settings.get("rope_type", "default")
        if kind in GROWING:
            raise HeadwiseError(f"Rebase(theta=...): this model's {kind} rotation changes with the length of the text.")
        if not settings:
            half = len(self.inv_freq)
            return (1 / float(theta) ** (torch.arange(half).double() / half)).to(self.inv_freq)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = copy.copy(self.module.config)
        config.rope_parameters = {**settings, "rope_theta": float(theta)}
        default = kind == "default"
        make = self.module.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[kind]
        return make(config)[0].to(self.inv_freq)

    def turns(self, call: AttentionCall, edit: Rebase, half: int) -> tuple[Turns, Turns]:
        """How far queries and keys are to be turned; made once for all layers of a forward."""
        key = (call.first, call.last, call.queries, call.j0, call.keys, call.batch, call.q.dtype, call.q.device, half)
        if edit not in self._kept or self._kept[edit][0] != key:
            keys = torch.arange(call.keys, device=call.q.device) + call.j0
            angles = [self.angles(edit, position, call.batch, half) for position in (call.i, keys)]
            made = [Turns.of(angle, call.q.dtype, self.interleaved) for angle in angles]
            self._kept[edit] = key, made[0], made[1]
        return self._kept[edit][1:]

    def angles(
        self, edit: Rebase, position: Int[Tensor, " token"], batch: int, half: int
    ) -> Float[Tensor, "row token half"]:
        """What is to be added to the angles of tokens at these positions, one row for every base."""
        place = position.double()
        old = self.inv_freq[:half].to(place)
        new = old[None]
        if edit.theta is not None:
            if edit not in self._bases:
                bases = torch.as_tensor(edit.theta).flatten().tolist()
                self._bases[edit] = torch.stack([self.frequencies(theta) for theta in bases]).to(place)
            new = on(self._bases[edit], place.device)[:, :half]
            if batch % len(new):
                raise HeadwiseError(f"Rebase(theta=...) has {len(new)} bases, but the batch has {batch} rows.")
        if edit.positions is None:
            return place[:, None] * (new - old)[:, None]
        if len(edit.positions) <= int(position.max()):
            raise HeadwiseError(
                f"Rebase(positions=...) has {len(edit.positions)} entries, but the text has "
                f"{int(position.max()) + 1} tokens."
            )
        moved = edit.positions.to(place.device)[position].double()
        return moved[:, None] * new[:, None] - place[:, None] * old


@dataclass(frozen=True)
class Turns:
    """Cosines of every channel that is turned, sines of every pair; [row, 1, token, ...] where every row of a batch has
    its own."""

    cos: Float[Tensor, "*rows token channel"]
    sin: Float[Tensor, "*rows token half"]
    interleaved: bool

    @classmethod
    def of(cls, angle: Float[Tensor, "*rows token half"], dtype: torch.dtype, interleaved: bool) -> Turns:
        angle = angle[:, None] if angle.ndim == 3 else angle
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return cls(cos.repeat_interleave(2, -1) if interleaved else torch.cat([cos, cos], -1), sin, interleaved)

    def __call__(self, x: Float[Tensor, "batch heads token dim"]) -> Float[Tensor, "batch heads token dim"]:
        """Rotates the first channels; row r of the batch by the angles of row r modulo their number."""
        shape, width = x.shape, self.cos.shape[-1]
        if self.cos.ndim == 4:
            x = x.unflatten(0, (-1, len(self.cos)))
        body, rest = x[..., :width], x[..., width:]
        half = width // 2
        one, two = (slice(half), slice(half, None)) if not self.interleaved else (slice(0, None, 2), slice(1, None, 2))
        # All keys are turned anew at every token: the sines' products go straight into the result.
        y = body * self.cos
        y[..., one].addcmul_(body[..., two], self.sin, value=-1)
        y[..., two].addcmul_(body[..., one], self.sin)
        return (torch.cat([y, rest], -1) if rest.shape[-1] else y).view(shape)


def find_rotary(model: nn.Module, attention: nn.Module) -> Rotary | None:
    """The rotation an attention module's queries and keys went through, read off the model itself."""
    module: Any = next((m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)), None)
    half = getattr(sys.modules.get(type(attention).__module__), "rotate_half", None)
    if module is None or half is None:
        return None
    turned = half(torch.arange(1.0, 9.0))
    if turned.tolist() == [-5, -6, -7, -8, 1, 2, 3, 4]:
        return Rotary(module.inv_freq, False, module)
    return Rotary(module.inv_freq, True, module) if turned.tolist() == [-2, 1, -4, 3, -6, 5, -8, 7] else None


def turn(
    x: Float[Tensor, "batch heads token dim"], angle: Float[Tensor, "token half"], interleaved: bool
) -> Float[Tensor, "batch heads token dim"]:
    """Rotates the first 2*half channels by these angles."""
    return Turns.of(angle, x.dtype, interleaved)(x)


def rebase(call: AttentionCall, edit: Rebase, heads: list[int]) -> AttentionCall:
    """The call with q and k of these heads turned from their own angles to the edit's."""
    rotary = call.rotary
    if rotary is None:
        where = call.site.name if call.site is not None else "this call"
        raise HeadwiseError(f"Rebase needs rotary embeddings headwise can read; {where} has none.")
    queries, keys = rotary.turns(call, edit, min(len(rotary.inv_freq), call.q.shape[-1] // 2))
    if len(heads) == call.heads:
        return replace(call, q=queries(call.q), k=keys(call.k))
    chosen = torch.tensor(heads, device=call.q.device)
    call = expand_kv(call)
    q, k = call.q.clone(), call.k.clone()
    q[:, chosen] = queries(q[:, chosen])
    k[:, chosen] = keys(k[:, chosen])
    return replace(call, q=q, k=k)
