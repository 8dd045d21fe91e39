"""Which label's head decides? Shares of the heads of a label attention layer in what a classifier says about a token or
a span ("Rethinking Self-Attention: Towards Interpretability in Neural Parsing", arXiv 1911.03875)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError


def label_contribution(
    y: Float[Tensor, "*batch width"], labels: int, weight: Float[Tensor, "classes width"] | None = None
) -> Float[Tensor, "*batch label"] | Float[Tensor, "*batch classes label"]:
    """y: the labels' parts side by side, of tokens (`swap.LabelAttention`) or of spans (differences of tokens').

    Without `weight` the authors' heuristic: the sum of a label's part, scaled so that the smallest of the labels is 0
    and the largest 1, and softmax over labels. With the matrix of a linear classifier what each part adds to each
    class's logit, `<W_c,l, Y_l>`: these sum to the logit without its bias.
    """
    if labels < 1 or y.shape[-1] % labels:
        raise HeadwiseError(f"labels: y is {y.shape[-1]} wide, which must be a multiple of them; got {labels}.")
    parts = y.unflatten(-1, (labels, -1))
    if weight is not None:
        if weight.ndim != 2 or weight.shape[1] != y.shape[-1]:
            raise HeadwiseError(f"weight: wanted [classes, {y.shape[-1]}]; got shape {tuple(weight.shape)}.")
        return (parts[..., None, :, :] * weight.unflatten(-1, (labels, -1))).sum(-1)
    sums = parts.sum(-1)
    low, high = sums.amin(-1, keepdim=True), sums.amax(-1, keepdim=True)
    return ((sums - low) / (high - low).clamp(min=1e-12)).softmax(-1)
