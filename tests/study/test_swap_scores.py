"""Studies of neural attention, Nexus, positional attention, smeared keys and token-aware phases, at tiny sizes."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError
from headwise.study import get
from headwise.study.positional_transformer import TASKS, PositionalTransformer, spread
from headwise.study.swap_neural_attention import near_pairs
from headwise.study.swap_phase_change import AttentionOnly, arrival, measured, prefix_matching, repeats
from headwise.study.swap_positional import pointed
from headwise.study.swap_positional_limits import after_mark

TINY = {
    "neural_attention_pairs": {"steps": 3},
    "neural_attention_language": {"steps": 2, "dim": 16, "layers": 1},
    "nexus_language": {"steps": 2, "dim": 16, "layers": 1},
    "nexus_two_hops": {"steps": 3, "dim": 16},
    "position_extrapolation": {"steps": 2, "dim": 16, "layers": 1, "length": 24, "rates": (1e-3,)},
    "positional_data_routing": {"steps": 3, "rows": 4, "width": 8, "n": 4},
    "positional_samples": {"steps": 3, "rows": 4, "width": 8, "n": 4, "samples": (5, 10)},
    "positional_value_scale": {"steps": 3, "rows": 16, "width": 8, "samples": 50, "n": 4},
    "smeared_key_phase_change": {"steps": 4, "every": 2, "dim": 16},
}


@pytest.mark.parametrize("name", TINY)
def test_runs_and_says_what_it_found(name: str):
    finding = get(name).measure(seeds=(0,), **TINY[name])
    assert finding.verdict in ("holds", "fails", "untestable")
    assert "nan" not in finding.reason
    assert finding.seeds == [0]


def test_the_tasks_of_numbers():
    x = torch.tensor([[1.0, -2.0, 3.0, -1.0]])
    wanted = {
        "sum": [1, -1, 2, 1], "min": [1, -2, -2, -2], "median": [1, -0.5, 1, 0], "sort": [-2, -1, 1, 3],
        "max_segment": [1, 1, 3, 3],
    }  # fmt: skip
    for name, values in wanted.items():
        torch.testing.assert_close(TASKS[name](x), torch.tensor([values], dtype=torch.float32))


def test_samples_lie_in_their_range():
    x = spread(500, 8, 6.0, torch.Generator().manual_seed(0), 2.0)
    assert x.shape == (500, 8)
    assert 2 < x.abs().max() <= 6
    inside = spread(500, 8, 2.0, torch.Generator().manual_seed(0))
    assert inside.abs().max() <= 2


def test_tasks_that_are_routed_by_data():
    batch = after_mark(5, 20)(torch.Generator().manual_seed(0))
    values, marks = batch["x"].unbind(-1)
    assert torch.equal(marks.sum(1), torch.ones(20))
    for row in range(20):
        assert torch.equal(batch["labels"][row, :, 0], values[row, marks[row].argmax() + 1].expand(5))
    batch = pointed(5, 20)(torch.Generator().manual_seed(0))
    assert torch.equal(batch["labels"][..., 0], batch["x"][..., 0].gather(1, batch["x"][..., 1:].argmax(-1)))


def test_the_positional_transformer():
    torch.manual_seed(0)
    model, x = PositionalTransformer(1, 1, 8), torch.randn(3, 8, 1)
    assert len(model.attentions) == 4
    assert model.attentions[0].q_proj.weight.shape == (18, 9)
    assert model(x).logits.shape == (3, 8, 1)
    standard = PositionalTransformer(1, 1, 8, mode="standard")
    assert standard.attentions[0].q_proj.weight.shape == (128, 64)
    assert standard.encode.in_features == 10
    turned = PositionalTransformer(1, 1, 8, mode="standard_rope")
    turned.load_state_dict(standard.state_dict())
    assert not torch.allclose(turned(x).logits, standard(x).logits)
    with pytest.raises(HeadwiseError, match="mode: one of positional, standard, standard_rope; got 'rope'"):
        PositionalTransformer(1, 1, 8, mode="rope")


def test_near_pairs_have_one_answer():
    batch = near_pairs(8)(torch.Generator().manual_seed(0))
    a, b, bit = batch["x"].unbind(-1)
    gap = (a[:, :, None] - b[:, None]).abs()
    nearest = gap.argmin(-1)
    assert torch.equal((bit.gather(1, nearest) > 0).long(), batch["labels"])
    two = gap.topk(2, -1, largest=False).values
    assert two[..., 0].max() <= 0.4 / 8 + 1e-6
    assert two[..., 1].min() >= 0.8 / 8 - 1e-6


def test_repeated_tokens_and_their_scores():
    ids = repeats(40)(torch.Generator().manual_seed(0))["input_ids"]
    for row in ids.tolist():
        period = row.index(row[0], 1)
        assert 8 <= period <= 24
        assert row[period:] == row[:-period]
        assert len(set(row[:period])) == period
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    induction = torch.zeros(1, 2, 1, 7, 7)
    for query, keys in {3: [1], 4: [2], 5: [3], 6: [1, 4]}.items():
        induction[:, 0, :, query, keys] = 1 / len(keys)
    induction[:, 1] = torch.eye(7)
    assert prefix_matching(induction, ids).tolist() == [[1.0, 0.0]]
    assert arrival([0.0, 0.1, 0.6, 0.5, 1.0]) == 2
    assert arrival([4.0, 3.0, 1.0, 0.5]) == 2


def test_an_untrained_model_learns_nothing_in_context():
    torch.manual_seed(0)
    made = AttentionOnly(lambda: swap.Attention(16, 2, causal=True), 40, 16, 1)
    prefix, icl = measured(made, repeats(40)(torch.Generator().manual_seed(1)))
    assert prefix < 0.2
    assert abs(icl) < 0.3
