"""Mechanisms of heads in a real model: those that start equal do, and generate through their caches."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from headwise.models import open_model
from headwise.scan.needles import haystack

pytestmark = pytest.mark.zoo

EQUAL = {
    "multi_token_attention": {"layers": "every4"},
    "fixed_head_attention": {"layers": [3, 20], "head_dim": 96},
    "mixture_of_head_attention": {"layers": [3, 20], "topk": 5},
    "multi_query_attention": {"layers": [3, 20], "kv_heads": 3},
}


@pytest.fixture(scope="module")
def opened():
    return open_model("zoo:llm")


@torch.no_grad()
def test_equal_at_the_start(opened):
    ids = opened.encode(haystack(), truncation=True, max_length=48)["input_ids"]
    plain = opened.model(input_ids=ids).logits
    for name, own in EQUAL.items():
        with swap.convert(opened, name, **own):
            assert (opened.model(input_ids=ids).logits - plain).abs().max() < 1e-3, name


@torch.no_grad()
def test_decodes_what_the_whole_text_gives(opened):
    ids = opened.encode(haystack(), truncation=True, max_length=24)["input_ids"]
    with swap.convert(opened, "multi_token_attention", layers=[2, 6]) as conversion:
        for mechanism in conversion.mechanisms.values():
            for parameter in (mechanism.pre_kernel, mechanism.post_kernel, mechanism.pre_mixing):
                parameter.add_(0.02)
        whole = opened.model(input_ids=ids).logits
        cache, parts = None, []
        for part in ids.split([10, 1, 5, 1, 7], 1):
            out = opened.model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-3
