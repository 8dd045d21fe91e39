"""How a mechanism knows where its tokens are: a rotation of queries and keys, a bias of scores, or nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError


@dataclass(frozen=True)
class Places:
    """Where the tokens of one forward are."""

    ids: Int[Tensor, "#batch token"]
    """What a rotation turns by."""
    first: int = 0
    """The place of the first of them in the whole sequence: what masks and distances count from."""
    cos_sin: tuple[Float[Tensor, "#batch token dim"], Float[Tensor, "#batch token dim"]] | None = None
    """The angles of a host model, which knows its own rotation."""


class Position(nn.Module):
    """No position at all; the base of the others."""

    def turn(self, x: Float[Tensor, "batch heads token dim"], places: Places) -> Float[Tensor, "batch heads token dim"]:
        """Queries or keys with their positions in them."""
        return x

    def bias(
        self, heads: int, i: Int[Tensor, " query"], j: Int[Tensor, " key"]
    ) -> Float[Tensor, "one heads query key"] | None:
        """What is added to the scores of queries at i and keys at j."""
        return None


class Rope(Position):
    """Rotary positions: halves of a head's dims turned by position times base^(-2d/D), as Llama's layers do. In a
    converted model the host's own angles are taken, whatever its base and scaling."""

    def __init__(self, base: float = 10000.0):
        super().__init__()
        if base <= 1:
            raise HeadwiseError(f"Rope: base must be above 1; got {base}.")
        self.base = base

    def turn(self, x: Float[Tensor, "batch heads token dim"], places: Places) -> Float[Tensor, "batch heads token dim"]:
        if places.cos_sin is not None:
            cos, sin = (part[:, None].to(x.dtype) for part in places.cos_sin)
            width = cos.shape[-1]  # some hosts turn a part of a head's dims
            return torch.cat([x[..., :width] * cos + half_turn(x[..., :width]) * sin, x[..., width:]], -1)
        dim = x.shape[-1]
        if dim % 2:
            raise HeadwiseError(f"Rope turns pairs of dims: head_dim must be even; got {dim}.")
        speed = self.base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
        angle = places.ids.to(x.device)[:, None, :, None].double() * speed
        cos, sin = (torch.cat([f(angle)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
        return x * cos + half_turn(x) * sin


class Alibi(Position):
    """A penalty of slope * distance on scores; slopes 2^(-8 h / heads), h = 1..heads ("Train Short, Test Long",
    arXiv 2108.12409)."""

    def bias(
        self, heads: int, i: Int[Tensor, " query"], j: Int[Tensor, " key"]
    ) -> Float[Tensor, "one heads query key"]:
        slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], device=i.device)
        return -slopes[None, :, None, None] * (i[:, None] - j).abs()


def half_turn(x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)


def sinusoids(length: int, dim: int) -> Float[Tensor, "length dim"]:
    """The fixed position vectors of "Attention Is All You Need" (arXiv 1706.03762)."""
    speed = torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2) / dim)
    angle = torch.arange(length)[:, None] * speed
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]
