"""Triadic modulation against loops over channels, its rules, and what is selected."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headwise import swap
from headwise.errors import HeadwiseError
from tests.swap.cases import DIM, HEADS, LENGTH, tokens


def by_loops(layer: swap.TriadicAttention, x: Tensor) -> Tensor:
    """The authors' vision layer: one latent, one head, additive Q and K, channel by channel."""
    q, k, v = (x @ p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q_l, k_l, v_l = q[0], k[0], v[0]
    n, keep = len(x) - 1, layer.topk
    mod_q = torch.stack([q_l * k[i] + q[i] for i in range(1, n + 1)])
    mod_k = torch.stack([k_l * q[i] + k[i] for i in range(1, n + 1)])
    mod_v = torch.stack([v[i] ** 2 + 2 * v[i] + q_l * k_l * (1 + v_l.abs()) for i in range(1, n + 1)])
    kept = [torch.zeros(keep, DIM, dtype=x.dtype) for _ in range(3)]
    where = torch.zeros(keep, DIM, dtype=torch.long)
    for part, rows in zip((mod_q, mod_k, mod_v), kept, strict=True):
        for channel in range(DIM):
            order = sorted(range(n), key=lambda i: -part[i, channel].item())[:keep]
            rows[:, channel] = part[order, channel]
            where[:, channel] = torch.tensor(order)  # V's in the end
    rows = [torch.cat([own[None], part]) for own, part in zip((q_l, k_l, v_l), kept, strict=True)]
    out = torch.softmax(rows[0] @ rows[1].T / math.sqrt(DIM), -1) @ rows[2]
    y = mod_v.clone()
    for r in range(keep):
        for channel in range(DIM):
            y[where[r, channel], channel] += out[1 + r, channel]
    return torch.cat([out[:1], y])


def test_equals_the_vision_layer():
    torch.manual_seed(0)
    layer, x = swap.TriadicAttention(DIM, topk=4, rule_v="latent_awake").double(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.stack([by_loops(layer, row) for row in x]), rtol=0, atol=1e-12)


def test_rules_at_their_limits():
    r, c, none = torch.tensor([-1.5, 0.5]), torch.tensor([2.0, -3.0]), torch.zeros(2)
    assert torch.equal(swap.modulate(r, none, "ad"), r)
    assert torch.equal(swap.modulate(r, none), r**2 + 2 * r)
    assert torch.equal(swap.modulate(none, c), c)
    assert torch.equal(swap.modulate(none, c, "ad"), none)
    assert torch.equal(swap.modulate(r, c, "isolation"), r)
    assert torch.equal(swap.modulate(r, c, "additive"), r + c)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_permuted_tokens_permute_the_output(heads):
    torch.manual_seed(0)
    layer, x = swap.TriadicAttention(DIM, heads, topk=4).double(), tokens()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(LENGTH - 1)])
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-12)


def test_as_many_kept_as_there_are_keeps_all():
    torch.manual_seed(0)
    layer, x = swap.TriadicAttention(DIM, topk=LENGTH - 1).double(), tokens()
    values = layer.modulated(x)[1][2]
    kept, _ = layer.strongest(values, None)
    torch.testing.assert_close(kept.sort(1).values, values.sort(1).values)
    assert torch.equal(layer.selection_map(x), torch.ones(2, LENGTH - 1).double())


def test_fewer_tokens_than_kept_under_padding():
    """Empty ranks are no rows: the same as with a smaller topk on the tokens alone."""
    torch.manual_seed(0)
    large, small = (swap.TriadicAttention(DIM, topk=k).double() for k in (8, 5))
    small.load_state_dict(large.state_dict())
    x, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, 6:] = False
    with torch.no_grad():
        torch.testing.assert_close(large(x, mask=mask)[:, :6], small(x[:, :6]), rtol=0, atol=1e-12)


def test_selection_map():
    torch.manual_seed(0)
    layer, x = swap.TriadicAttention(DIM, topk=3, rule_v="isolation").double(), tokens(1)
    found = layer.selection_map(x)
    torch.testing.assert_close(found.sum(), torch.tensor(3.0).double())
    largest = layer.v_proj(x)[0, 1:].argsort(0, descending=True)[:3]
    assert found[0, 4] == (largest == 4).any(0).double().mean()


def test_iterations_use_the_last_result():
    torch.manual_seed(0)
    layer, x = swap.TriadicAttention(DIM, topk=3, iterations=2, rule_qk="ad", bound="relu6").double(), tokens()
    q, k = layer.q_proj(x), layer.k_proj(x)
    q_l, k_l, q, k = q[:, :1], k[:, :1], q[:, 1:], k[:, 1:]
    for _ in range(2):
        q, k = (q * (1 + q_l * k)).clamp(0, 6), (k * (1 + k_l * q)).clamp(0, 6)
    torch.testing.assert_close(layer.modulated(x)[1][0], q)
    torch.testing.assert_close(layer.modulated(x)[1][1], k)


def test_latent_tokens_stand_in_front():
    latents, x = swap.LatentTokens(2, DIM).double(), tokens()
    assert torch.equal(latents(x)[:, 2:], x)
    assert torch.equal(latents(x)[1, :2], latents.tokens)


def test_operations_grow_with_the_length_alone():
    layer = swap.TriadicAttention(DIM)
    assert layer.flops(4096) - layer.flops(2048) == 2 * (layer.flops(2048) - layer.flops(1024))


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"has no causal form"):
        swap.TriadicAttention(DIM, causal=True)
    with pytest.raises(HeadwiseError, match=r"heads side by side must be dim wide"):
        swap.TriadicAttention(DIM, 4, 2)
    with pytest.raises(HeadwiseError, match=r"at least 1; got 0, 12, 1"):
        swap.TriadicAttention(DIM, latents=0)
    with pytest.raises(HeadwiseError, match=r"rules are isolation.*got 'x', 'ad_awake', None"):
        swap.TriadicAttention(DIM, rule_qk="x")
    with pytest.raises(HeadwiseError, match=r"rule: one of isolation"):
        swap.modulate(torch.ones(1), torch.ones(1), "latent_awake")
    with pytest.raises(HeadwiseError, match=r"keeps topk=12 tokens; got 11: lower topk"):
        swap.TriadicAttention(DIM).double()(tokens())
    with pytest.raises(HeadwiseError, match=r"works on one sequence"):
        swap.TriadicAttention(DIM).double()(tokens(), context=tokens())
    with pytest.raises(HeadwiseError, match=r"give padding as bools"):
        swap.TriadicAttention(DIM).double()(tokens(), mask=torch.ones(1, 1, 12, 12, dtype=torch.bool))
