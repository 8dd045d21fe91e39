"""Label attention against loops over labels and tokens, its limit cases, and what each label contributes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from headwise import scan, swap
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from tests.swap.cases import DIM, HEADS, tokens


def normed(z: Tensor, norm: nn.Module) -> Tensor:
    std = ((z - z.mean()) ** 2).sum().div(len(z) - 1).sqrt()
    return norm.a * (z - z.mean()) / (std + 1e-3) + norm.b


def by_loops(layer: swap.LabelAttention, x: Tensor) -> Tensor:
    """Token by token and label by label."""
    width, value, rows = layer.head_dim, layer.value_dim, []
    for t in range(len(x)):
        parts = []
        for label in range(layer.heads):
            W_K = layer.k_proj.weight[label * width : (label + 1) * width]
            W_V = layer.v_proj.weight[label * value : (label + 1) * value]
            if layer.query is None:
                q = layer.q_proj.weight[label * width : (label + 1) * width] @ x[t]
            else:
                q = layer.query[label, 0]
            a = torch.softmax(torch.stack([q @ (W_K @ row) for row in x]) / math.sqrt(DIM), 0)
            c = sum(weight * (W_V @ row) for weight, row in zip(a, x, strict=True))
            if layer.combine == "concat":
                parts.append(c)
            else:
                parts.append(normed(layer.down.weight @ (x[t] + layer.back.weight @ c), layer.norm))
        row = torch.cat(parts)
        if layer.combine == "concat":
            row = normed(x[t] + layer.o_proj.weight @ row, layer.norm)
        if layer.ffn is not None:
            row = normed(row + layer.ffn(row), layer.ffn_norm)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "own",
    [
        {"head_dim": 10, "value_dim": 6, "proj_dim": 5, "ffn": 12},
        {"query": "token"},
        {"combine": "concat", "value_dim": 3},
        {"combine": "concat", "query": "token", "ffn": 9},
    ],
)
def test_equals_loops(own):
    torch.manual_seed(0)
    layer, x = swap.LabelAttention(DIM, HEADS, **own).double(), tokens(2, 5)
    with torch.no_grad():
        wanted = torch.stack([by_loops(layer, row) for row in x])
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)


def test_halves_come_from_content_and_position():
    torch.manual_seed(0)
    layer, x = swap.LabelAttention(DIM, HEADS, partitioned=True).double(), tokens(1, 5)
    keys = layer.k_proj(x)[0].unflatten(-1, (HEADS, -1))
    content, position = (part.weight.view(HEADS, 4, DIM // 2) for part in layer.k_proj.parts)
    torch.testing.assert_close(keys[3, 2, :4], content[2] @ x[0, 3, : DIM // 2])
    torch.testing.assert_close(keys[3, 2, 4:], position[2] @ x[0, 3, DIM // 2 :])
    other = x.clone()
    other[..., DIM // 2 :] += 1
    assert torch.equal(layer.k_proj(other)[0].unflatten(-1, (HEADS, -1))[..., :4], keys[..., :4])


def test_one_distribution_a_label_that_order_does_not_change():
    torch.manual_seed(0)
    layer, x = swap.LabelAttention(DIM, HEADS).double(), tokens(1, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attend(layer, [Map()]) as run:
        y = layer(x)
    weights = torch.as_tensor(run.tree["text"].dataset["map"].values)
    assert weights.numel() == HEADS * 7
    torch.testing.assert_close(weights.reshape(HEADS, 7).sum(-1).double(), torch.ones(HEADS).double())
    torch.testing.assert_close(layer(x[:, order]), y[:, order])


def test_one_token_gives_its_value():
    torch.manual_seed(0)
    layer, x = swap.LabelAttention(DIM, 1, combine="concat").double(), tokens(1, 1)
    torch.testing.assert_close(layer(x), layer.norm(x + layer.o_proj(layer.v_proj(x))))


def test_contributions_sum_to_the_logit():
    torch.manual_seed(0)
    layer, head = swap.LabelAttention(DIM, HEADS, proj_dim=6).double(), nn.Linear(HEADS * 6, 5).double()
    y = layer(tokens())
    shares = scan.label_contribution(y, HEADS, head.weight)
    assert shares.shape == (2, 12, 5, HEADS)
    torch.testing.assert_close(shares.sum(-1) + head.bias, head(y))
    part = torch.zeros(HEADS, 6).double()
    part[2] = 1
    without = head(y * (1 - part.flatten()))
    torch.testing.assert_close(head(y) - without, shares[..., 2])
    assert layer.slices(y).shape == (2, 12, HEADS, 6)


def test_the_heuristic_is_a_softmax_of_scaled_sums():
    y = torch.tensor([1.0, 1.0, 4.0, 4.0, 2.0, 3.0])
    wanted = torch.softmax(torch.tensor([0.0, 1.0, 0.5]), 0)
    torch.testing.assert_close(scan.label_contribution(y, 3), wanted)
    torch.testing.assert_close(scan.label_contribution(torch.ones(6), 3), torch.full((3,), 1 / 3))


def test_vectors_cost_less_than_queries():
    vector, token = (swap.LabelAttention(DIM, HEADS, query=query).flops(100) for query in ("vector", "token"))
    assert vector < 0.5 * token


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"leave out kv_heads; got 2"):
        swap.LabelAttention(DIM, HEADS, 2)
    with pytest.raises(HeadwiseError, match=r"query is vector or token"):
        swap.LabelAttention(DIM, HEADS, query="none")
    with pytest.raises(HeadwiseError, match=r"proj_dim must be at least 2 to be normed; got 1"):
        swap.LabelAttention(DIM, HEADS, proj_dim=1)
    with pytest.raises(HeadwiseError, match=r"partitioned wants even widths"):
        swap.LabelAttention(DIM, HEADS, head_dim=7, partitioned=True)
    with pytest.raises(HeadwiseError, match=r"their parts are gone"):
        swap.LabelAttention(DIM, HEADS, combine="concat").slices(torch.zeros(DIM))
    with pytest.raises(HeadwiseError, match=r"give a mask of keys"):
        swap.LabelAttention(DIM, HEADS).double()(tokens(), mask=torch.ones(1, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(HeadwiseError, match=r"y is 6 wide, which must be a multiple of them; got 4"):
        scan.label_contribution(torch.ones(6), 4)
    with pytest.raises(HeadwiseError, match=r"weight: wanted \[classes, 6\]; got shape \(2, 5\)"):
        scan.label_contribution(torch.ones(6), 3, torch.ones(2, 5))
