"""Normalisers: how scores become weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attention.call import AttentionCall
from headwise.errors import HeadwiseError

Scored = Float[Tensor, "batch heads query key"]
Seen = Bool[Tensor, "#batch #heads query key"]


class Normaliser(nn.Module):
    """Softmax; the base of the others. `s` is -inf where a key is not seen, and such keys get the weight 0."""

    softmax = False

    def forward(self, s: Scored, seen: Seen) -> Scored:
        return torch.softmax(s, -1).masked_fill(~seen, 0.0)  # a row that sees nothing: 0, not nan

    def has_kernel(self, call: AttentionCall) -> bool:
        """Whether `kernel` can do this call, whose scores are scaled dot products."""
        return False

    def kernel(self, call: AttentionCall) -> Float[Tensor, "batch heads query value_dim"]:
        """The output by a kernel of the normaliser's own, with gradients."""
        raise TypeError(f"{type(self).__name__} has no kernel.")


class Softmax(Normaliser):
    """`a_ij = exp(s_ij) / sum_k exp(s_ik)`."""

    softmax = True


class Activation(Normaliser):
    """`a_ij = f(s_ij)`, f = relu, elu1 (elu + 1), sigmoid or exp; `normalise` divides by the row's sum (plus 1e-8),
    otherwise by nothing ("When Attention Sink Emerges in Language Models: An Empirical View", arXiv 2410.10781). exp by
    itself is cut off at scores of 5, as that of arXiv 2507.23632 is."""

    FUNCTIONS: ClassVar = {
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "elu1": lambda s: torch.nn.functional.elu(s) + 1,
        "exp": lambda s: s.clamp(max=5.0).exp(),
    }

    def __init__(self, function: str = "relu", normalise: bool = False):
        super().__init__()
        if function not in self.FUNCTIONS:
            raise HeadwiseError(f"Activation: function is one of {', '.join(self.FUNCTIONS)}; got {function!r}.")
        self.function, self.normalise = function, normalise

    def forward(self, s: Scored, seen: Seen) -> Scored:
        a = torch.where(seen, self.FUNCTIONS[self.function](s.masked_fill(~seen, 0.0)), 0.0)
        return a / (a.sum(-1, keepdim=True) + 1e-8) if self.normalise else a


class Entmax(Normaliser):
    """Tsallis' alpha-entmax: sparse weights that sum to 1; alpha 2 is sparsemax, alpha 1.5 lies between it and softmax
    ("Sparse Sequence-to-Sequence Models", arXiv 1905.05702). `a = max((alpha - 1) s - tau, 0)^(1/(alpha-1))`, the tau
    of each row from its sorted scores, exact for these two alphas."""

    def __init__(self, alpha: float = 1.5):
        super().__init__()
        if alpha not in (1.5, 2.0):
            raise HeadwiseError(f"Entmax: alpha is 1.5 or 2; got {alpha}.")
        self.alpha = alpha

    def forward(self, s: Scored, seen: Seen) -> Scored:
        low = torch.finfo(s.dtype).min / 4
        z = (self.alpha - 1) * s.masked_fill(~seen, low)
        z = z - z.amax(-1, keepdim=True)
        ordered = z.sort(-1, descending=True).values.clamp(min=-1e4)  # far below any support: sums stay exact
        count = torch.arange(1, s.shape[-1] + 1, device=s.device, dtype=s.dtype)
        mean = ordered.cumsum(-1) / count
        if self.alpha == 2.0:
            taus = mean - 1 / count
        else:
            spread = ((ordered**2).cumsum(-1) / count - mean**2) * count
            taus = mean - ((1 - spread) / count).clamp(min=0).sqrt()
        support = (taus <= ordered).sum(-1, keepdim=True).clamp(min=1)
        tau = taus.gather(-1, support - 1)
        a = (z - tau).clamp(min=0) ** (1 if self.alpha == 2.0 else 2)
        return a.masked_fill(~seen, 0.0)
