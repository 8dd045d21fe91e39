"""Mechanisms of heads in bf16 and float32, forward and backward."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from tests.swap.cases import CASES, make, tokens

NAMES = (
    "fixed_head_attention", "head_embedding_attention", "mixture_of_head_attention", "multi_query_attention",
    "multi_token_attention",
)  # fmt: skip


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("name,number", [(name, n) for name in NAMES for n in range(len(CASES[name]))])
def test_lower_precision(name: str, number: int, dtype: torch.dtype, tolerance: float):
    layer, x = make(name, CASES[name][number], causal=True), tokens()
    wanted = layer(x)
    gates = getattr(layer, "gates", None)
    low = layer.to(dtype)
    out = low(x.to(dtype))
    assert out.dtype == dtype
    same = slice(None) if gates is None else ((gates - low.gates).abs().amax((1, 2)) < 0.1)  # rounding may pick others
    assert len(out[same]), "rounding picked other heads in every row"
    torch.testing.assert_close(out[same].double(), wanted[same], rtol=0, atol=tolerance * wanted.std().item())
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters() if p is not unused(low))
    with torch.no_grad():
        cache = swap.Cache()
        parts = torch.cat([low(part, cache=cache) for part in x.to(dtype).split([7, 1, 4], 1)], 1)
    torch.testing.assert_close(parts.double(), out.double(), rtol=0, atol=tolerance * wanted.std().item())


def unused(layer: swap.Mechanism) -> torch.nn.Parameter | None:
    """Added to keys that nothing turns: it cancels, and is left out."""
    folded = isinstance(layer, swap.HeadEmbeddingAttention) and layer.mode == "add" and layer.folds
    return layer.k_embed if folded else None
