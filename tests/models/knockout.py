"""Four identities that hold for any architecture and pin down which weights belong to which head.

A head whose values are zero writes nothing, like a head whose output weights are zero; a head with zero queries
scores as one with zero keys does; and what a silenced head looks at is of no account.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from headwise.models import Site


@contextmanager
def zeroed(model: nn.Module, *weights: Tensor | None) -> Iterator[None]:
    """Zero some views of the model's weights for a while."""
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for weight in weights:
            if weight is not None:
                weight.zero_()
        try:
            yield
        finally:
            for name, value in model.named_parameters():
                value.copy_(kept[name])


def row(bias: Tensor | None, at: slice) -> Tensor | None:
    return None if bias is None else bias[at]


def gaps(site: Site, run, model: nn.Module) -> dict[str, float]:
    """How far each identity is from holding, and how much a knock-out changes at all ("change")."""
    plain = run()
    kv = slice(site.kv_heads - 1, site.kv_heads)
    heads = slice((site.kv_heads - 1) * site.group, site.heads)
    one = slice(site.heads - 1, site.heads)
    with zeroed(model, site.W_O[heads]):
        no_output = run()
    with zeroed(model, site.W_V[kv], row(site.b_V, kv)):
        no_value = run()
    with zeroed(model, site.W_Q[heads], row(site.b_Q, heads)):
        no_query = run()
    with zeroed(model, site.W_K[kv], row(site.b_K, kv)):
        no_key = run()
    with zeroed(model, site.W_O[one]):
        silent = run()
    with zeroed(model, site.W_O[one], site.W_Q[one], row(site.b_Q, one)):
        blind = run()
    return {
        "value": apart(no_output, no_value),
        "key": apart(no_query, no_key),
        "query": apart(silent, blind),
        "change": min(apart(plain, no_output), apart(plain, no_query)),
    }


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max((float((x - y).abs().max()) for x, y in zip(a, b, strict=True)), default=0.0)
