"""Softmax attention with its numerator, its denominator and gates exchanged one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads
from headwise.swap.parts.numerators import Numerator
from headwise.swap.parts.positions import Places, Position, Rope


class Unit(nn.Module):
    """Every vector to length 1."""

    def __init__(self, _width: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


NORMS: dict[str, Callable[[int], nn.Module]] = {"l2": Unit, "rms": nn.RMSNorm, "layer": nn.LayerNorm}
ROWS = ("sum", "clamp", "detach", "count", "none")


class SoftmaxAblation(Attention):
    """`z_i = norm(g_i sum_j E(s_ij) h_j v_j / D_i)`.

    `numerator`: exp, or "taylor" up to `order` (see `Numerator`, also for `clamp`). `normaliser`: a divisor of rows D
    (sum, clamp, detach, count, none), or a norm of every head's output in its place: "l2" to length 1, "rms" or "layer"
    with what these learn, one for all heads. `out_gate`: `g = sigmoid(w_h . x_i + b_h)` for a query and head;
    `in_gate`: `h`, the same for a key and key-value head. Softmax is the numerator exp with the normaliser sum.

    A norm cancels whatever divides a row, and the out gate (up to the eps of rms and layer). So exp with a norm runs as
    softmax, and the series with a norm is divided by the count. The output of l2 has another size than softmax's: a
    converted model starts elsewhere unless the normaliser is sum, clamp or detach (for the forward) and the gates off.
    """

    paper: ClassVar[Paper] = Paper(
        "On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective", "2507.23632"
    )
    what: ClassVar[str] = "softmax with another numerator, norms for its denominator, gates"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        numerator: Literal["exp", "taylor"] = "exp",
        order: int = 2,
        clamp: float = 5.0,
        normaliser: Literal["sum", "clamp", "detach", "count", "none", "l2", "rms", "layer"] = "l2",
        in_gate: bool = False,
        out_gate: bool = False,
        position: Position | None = None,
        **parts: Any,
    ):
        if normaliser not in (*ROWS, *NORMS):
            raise HeadwiseError(f"normaliser: one of {', '.join((*ROWS, *NORMS))}; got {normaliser!r}.")
        divide: Any = normaliser
        if normaliser in NORMS:
            divide = "sum" if numerator == "exp" else "count"
        rows = Numerator(numerator, divide, order, clamp)
        super().__init__(dim, heads, kv_heads, head_dim, normaliser=rows, position=position or Rope(), **parts)
        self.z_norm = NORMS.get(normaliser, nn.Identity)(self.value_dim)
        self.in_gate = nn.Linear(dim, self.kv_heads) if in_gate else None
        self.out_gate = nn.Linear(dim, heads) if out_gate else None

    def project(
        self,
        x: Float[Tensor, "batch query dim"],
        source: Float[Tensor, "batch key dim"],
        here: Places,
        crossed: bool = False,
    ) -> tuple[Heads, Heads, Heads]:
        q, k, v = super().project(x, source, here, crossed)
        return q, k, v if self.in_gate is None else v * opened(self.in_gate, source)

    def combine(self, z: Heads, x: Float[Tensor, "batch query dim"]) -> Float[Tensor, "batch query dim"]:
        z = z if self.out_gate is None else z * opened(self.out_gate, x)
        return super().combine(self.z_norm(z), x)

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        gates = sum(
            tokens * gate.weight.numel()
            for tokens, gate in ((keys, self.in_gate), (queries, self.out_gate))
            if gate is not None
        )
        return super().flops(queries, keys) + 2 * gates


def opened(gate: nn.Module, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch heads token one"]:
    return torch.sigmoid(gate(x)).transpose(1, 2)[..., None]
