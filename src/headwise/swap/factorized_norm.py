"""LayerNorm in its two halves, and these in the place of a model's own norms."""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.open import Opened
from headwise.paper import Paper
from headwise.swap.convert import set_module

BEFORE_ATTENTION = r"(input_layernorm|ln_1|norm1|layernorm_before)$"
"""What transformers calls the norm in front of attention in most pre-norm models."""


class FactorizedLayerNorm(nn.Module):
    """`project` takes the mean off, `scale` gives every vector the length sqrt(dim). Both: LayerNorm; scale alone:
    RMSNorm; neither: nothing. The projection gives attention a query that looks at all keys equally (any multiple of
    the ones vector), the scaling makes every key the best of some query. The paper's own script without projection
    scales to 1/sqrt(dim), having divided where it should multiply; here the length is right."""

    paper: ClassVar[Paper] = Paper("On the Expressivity Role of LayerNorm in Transformers' Attention", "2305.02582")

    def __init__(self, dim: int, project: bool = True, scale: bool = True, affine: bool = True, eps: float = 0.0):
        super().__init__()
        self.project, self.scale, self.eps = project, scale, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token dim"]:
        if self.project:
            x = x - x.mean(-1, keepdim=True)
        if self.scale:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


def replace_norm(
    model: Opened | nn.Module,
    which: str = BEFORE_ATTENTION,
    project: bool = True,
    scale: bool = True,
    affine: bool = True,
) -> dict[str, nn.Module]:
    """Puts FactorizedLayerNorm, in place, where the norms stand whose names `which` (a regular expression) finds, by
    default those in front of attention. With `affine` each starts with the gain and bias of the norm before it, so that
    in the place of a LayerNorm with both halves, and of an RMSNorm with the scale alone, the output is the same.
    Returns the old norms by name: `model.set_submodule(name, norm)` puts one back."""
    inner = model.model if isinstance(model, Opened) else model
    found = {name: module for name, module in inner.named_modules() if re.search(which, name)}
    wrong = [name for name, module in found.items() if not is_norm(module)]
    if wrong or not found:
        raise HeadwiseError(
            f"replace_norm(which=...): wanted a regular expression that finds norms in {type(inner).__name__}; "
            f"{which!r} finds {', '.join(wrong) or 'nothing'}."
        )
    for name, norm in found.items():
        like = next(norm.parameters())
        if affine and len(like) % 2:
            raise HeadwiseError(f"replace_norm: the gain of {name} can't be read, as it is {len(like)} wide, not even.")
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None)) or 0.0
        made = FactorizedLayerNorm(len(like), project, scale, affine, float(eps)).to(like)
        if affine:
            with torch.no_grad():
                for own, value in zip(made.parameters(), gain_and_bias(norm, like), strict=True):
                    own.copy_(value)
        set_module(inner, name, made.train(norm.training))
    return found


def is_norm(module: nn.Module) -> bool:
    own = list(module.parameters())
    return bool(own) and not list(module.children()) and all(p.ndim == 1 and len(p) == len(own[0]) for p in own)


@torch.no_grad()
def gain_and_bias(norm: nn.Module, like: Tensor) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Read from the norm's answers, as some keep the gain less 1. To x of +1 and -1, mean 0 and square mean 1, a norm
    answers gain x + bias; x is made large so that eps is nothing beside it."""
    signs = torch.ones_like(like)
    signs[1::2] = -1
    up, down = norm(2**12 * signs), norm(-(2**12) * signs)
    return (up - down) / 2 * signs, (up + down) / 2
