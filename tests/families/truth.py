"""What the readings must be, worked out from whole weight matrices in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .family import Call

SEGMENTS = ("first", "previous", "window:2")
PLACES = ("first", "rest")


def reduce(weights: Tensor, start: int = 0, first: int = 0) -> dict[str, Tensor]:
    """Every reading of the matrix test, from weights [batch, heads, query, key].

    `start` and `first` are the positions of the first query and the first key: not 0 while a cache is in use."""
    a = weights.double()
    i = torch.arange(a.shape[2])[:, None] + start
    j = torch.arange(a.shape[3])[None] + first
    gap = (i - j).abs().double()
    masks = [(j == 0).expand_as(gap), i - j == 1, gap <= 2]
    return {
        "entropy": torch.special.entr(a).sum(-1),
        "top_value": a.max(-1, keepdim=True).values,
        "distance": (a * gap).sum(-1),
        "distance_sq": (a * gap**2).sum(-1),
        "mass": torch.stack([(a * mask).sum(-1) for mask in masks], -1),
        "place": torch.stack([(a * masks[0]).sum(-1), (a * ~masks[0]).sum(-1)], -1),
        "map": a,
    }


@contextmanager
def recorded_torch(model: nn.Module) -> Iterator[list[Call]]:
    """Collect the weights of every call to PyTorch's own attention functions, and the innermost module under way."""
    names = {id(module): name for name, module in model.named_modules()}
    under_way: list[str] = []
    calls: list[Call] = []
    plain, fused = F.scaled_dot_product_attention, F.multi_head_attention_forward

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        output = plain(query, key, value, attn_mask, **kwargs)
        causal = kwargs.get("is_causal", False)
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        scores = query.double() @ key.double().transpose(-1, -2) * scale
        if causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        calls.append(Call(under_way[-1], scores.softmax(-1), query, key, value))
        return output

    def many_heads(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        kwargs |= {"need_weights": True, "average_attn_weights": False}
        output, weights = fused(query, key, value, *args, **kwargs)
        calls.append(Call(under_way[-1], weights, query, key, value))
        return output, None

    with ExitStack() as stack:
        for module in model.modules():
            name = names[id(module)]
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: under_way.append(name)).remove)
            stack.callback(module.register_forward_hook(lambda *_: under_way.pop() and None).remove)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(patch.object(F, "multi_head_attention_forward", many_heads))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield calls
