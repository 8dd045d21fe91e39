"""The studies of sigmoid, sinks, softmax's parts and structural attention, small; energies against their gradients."""

from __future__ import annotations

import pytest
import torch
from tests.scan.models import llama

from headwise.study import energies
from headwise.study.energies import Hopfield, Mixture, Predictive, Slots, descend
from headwise.study.swap_ablation import softmax_parts, taylor_orders
from headwise.study.swap_sigmoid import sigmoid_attention
from headwise.study.swap_sinks import sink_swaps
from headwise.study.swap_structure import Chain, Latest, expanding_window, multi_hop_chain


def drawn(slots: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (slots, 9)]


def gradient(kind, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(kind.energy(z, x), z)[0]


def test_steps_follow_the_gradient():
    z, x = drawn()
    precision = torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
    hopfield, mixture, coding = Hopfield(2.0), Mixture(), Predictive(precision, 0.1)
    torch.testing.assert_close(hopfield.step(z, x), z - gradient(hopfield, z, x))
    weights = torch.softmax(-energies.distances(z, x), 0).sum(1, keepdim=True)
    torch.testing.assert_close(mixture.step(z, x), z - gradient(mixture, z, x) / weights)
    torch.testing.assert_close(coding.step(z, x), z - 0.1 * gradient(coding, z, x))


def test_energies_fall_to_a_fixed_point():
    z, x = drawn()
    for kind in (Hopfield(2.0), Mixture(), Predictive(torch.full((9,), 2.0, dtype=torch.float64), 0.5)):
        path = descend(kind, z, x, 300)
        values = torch.stack([kind.energy(at, x) for at in path])
        assert values.diff().max() < 1e-12
        assert gradient(kind, path[-1], x).abs().max() < 1e-3


def test_one_slot_is_the_mean_and_slots_compete():
    z, x = drawn(1)
    torch.testing.assert_close(Slots().step(z, x)[0], x.mean(0))
    torch.testing.assert_close(Mixture().step(z, x)[0], x.mean(0))
    z, x = drawn(3)
    unit = z / z.norm(dim=1, keepdim=True)  # the same length for all: the mixture of variance sqrt(4)
    posterior = torch.softmax(-energies.distances(unit, x) / 2, 0)
    torch.testing.assert_close(Slots().step(unit, x), posterior / posterior.sum(1, keepdim=True) @ x)


def test_energies_are_measured():
    finding = energies.attention_energies(seeds=(0,), trials=3, steps=5)
    rises = finding.measured["share_of_rises"]
    assert rises["hopfield"] == rises["mixture"] == rises["predictive coding"] == 0
    assert rises["shuffled hopfield"] > 0


def test_chains_are_answered_by_their_rule():
    batch = Chain(nodes=5, colours=3, rows=4)(torch.Generator().manual_seed(0))
    name, other, colour = (part.argmax(-1) for part in batch["x"].split([5, 5, 3], -1))
    for row in range(4):
        where = {int(n): place for place, n in enumerate(name[row])}
        for place in range(5):
            one = where[int(other[row, place])]
            two = where[int(other[row, one])]
            assert one != place
            assert batch["labels"][row, place] == 3 * colour[row, one] + colour[row, two]


def test_the_latest_mark_is_asked_for():
    batch = Latest(every=4, length=20, rows=3)(torch.Generator().manual_seed(0))
    colour, marked = batch["x"][..., :-1].argmax(-1), batch["x"][..., -1] > 0
    for row in range(3):
        latest = -100
        for place in range(20):
            latest = int(colour[row, place]) if marked[row, place] else latest
            assert batch["labels"][row, place] == latest


@pytest.mark.parametrize(
    "measure,key",
    [
        (lambda: multi_hop_chain(seeds=(0,), steps=2, nodes=4), "accuracy"),
        (lambda: expanding_window(seeds=(0,), gaps=(2, 8), steps=2), "window"),
        (lambda: sigmoid_attention(seeds=(0,), steps=2, rows=2), "start_norm_over_softmax"),
        (lambda: sink_swaps(seeds=(0,), steps=2, length=16), "mean"),
        (lambda: softmax_parts(seeds=(0,), steps=2, rows=2), "nats"),
    ],
)
def test_studies_run(measure, key):
    finding = measure()
    assert finding.measured[key]
    assert finding.reason.endswith(".")


def test_shares_of_the_first_token():
    mean = sink_swaps(seeds=(0,), steps=1, length=16).measured["mean"]
    even = sum(1 / (n + 1) for n in range(1, 16)) / 15
    assert all(abs(m["first"] - even) < 0.05 for m in mean.values())  # as it starts
    assert mean["softmax"]["row_sum"] == pytest.approx(1) == mean["sigmoid, normalised"]["row_sum"]
    assert 0.5 < mean["key bias"]["row_sum"] < 0.99 < 3 < mean["sigmoid"]["row_sum"]


def test_outputs_begin_far_larger_without_a_bias():
    start = sigmoid_attention(seeds=(0,), steps=1, rows=2).measured["start_norm_over_softmax"]
    assert start["softmax"] == 1
    assert start["sigmoid, b = 0"] > 4 > 1.2 > start["sigmoid, b = -ln n"]


def test_a_long_series_is_softmax_in_a_whole_model():
    finding = taylor_orders(llama(), orders=(0, 2, 80), sequences=1, length=24)
    above = finding.measured["above_softmax"]
    assert abs(above["80"]) < 1e-3 < abs(above["0"])
