"""Random attention calls, with everything a call can have."""

import math

import torch
from hypothesis import strategies as st

from headwise.attention.call import AttentionCall, Labels
from headwise.attention.mask import Mask

NAMES = ("start", "middle", "end")


@st.composite
def calls(draw, dtype: torch.dtype, most: int = 300) -> AttentionCall:
    """Batch, heads, groups, lengths 1 to `most`, head dims, masks of every kind, softcap, sinks, position bias."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pick = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)]))
    heads, kv = pick
    batch = draw(st.integers(1, 3))
    keys = draw(st.integers(1, most))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    dim, value_dim = draw(st.sampled_from([(8, 8), (16, 12), (5, 7), (64, 64)]))

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=dtype)

    sharp = draw(st.sampled_from([0.3, 1.0, 6.0]))
    j0 = draw(st.sampled_from([0, 0, 7]))
    offset = j0 + keys - queries
    kind = draw(st.sampled_from(["full", "causal", "window", "two-sided", "rule", "allowed", "added", "indices"]))
    mask = Mask(batch=batch)
    if kind in ("causal", "window", "rule"):
        mask.right = 0
    if kind == "window":
        mask.left = draw(st.integers(0, 40))
    if kind == "two-sided":
        mask.left = mask.right = draw(st.integers(0, 40))
    if kind == "rule":
        step = draw(st.integers(1, 9))
        mask.rule = lambda b, h, i, j: (i - j) % (step + b) == 0
    if kind == "allowed":
        mask.allowed = torch.rand(draw(st.sampled_from([1, batch])), 1, queries, keys, generator=generator) > 0.4
    if kind == "added":
        mask.added = random(1, draw(st.sampled_from([1, heads])), draw(st.sampled_from([1, queries])), keys)
        mask.added = mask.added.masked_fill(
            torch.rand(mask.added.shape, generator=generator) > 0.7, torch.finfo(dtype).min
        )
    if kind == "indices":
        mask.indices = torch.randint(0, keys, (batch, queries, draw(st.integers(1, 20))), generator=generator)
    if draw(st.booleans()):
        mask.key_valid = torch.rand(batch, keys, generator=generator) > 0.3
    labels = Labels(
        NAMES,
        torch.randint(0, 3, (batch, keys), generator=generator),
        torch.randint(0, 3, (batch, queries), generator=generator),
    )
    return AttentionCall(
        q=random(batch, heads, queries, dim, scale=sharp),
        k=random(batch, kv, keys, dim),
        v=random(batch, kv, keys, value_dim),
        scale=draw(st.sampled_from([1.0, 1 / math.sqrt(dim)])) if sharp < 6 else 1 / math.sqrt(dim),
        mask=mask,
        softcap=draw(st.sampled_from([None, None, 5.0])),
        sinks=draw(st.sampled_from([None, None, random(heads)])),
        bias=draw(st.sampled_from([None, None, random(1, heads, queries, keys)])),
        i=torch.arange(queries) + offset,
        j0=j0,
        query_valid=torch.rand(batch, queries, generator=generator) > 0.2 if draw(st.booleans()) else None,
        labels=labels,
    )
