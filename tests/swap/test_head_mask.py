"""Heads masked in training: what is masked, by what, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from headwise import swap
from headwise.attention import attend
from headwise.errors import HeadwiseError
from headwise.study.hosts import Decoder
from headwise.study.train import Recipe, train, windows
from tests.models.tiny import llama, t5

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10], [1, 11, 12, 5, 6, 13, 14]])


def small(seed: int = 0, bias: bool = True) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(lambda _: swap.Attention(16, 4, causal=True, bias=bias, position=swap.Rope()), 20, 16, 2)


def test_no_heads_is_training_as_it_was():
    data, recipe = windows(torch.arange(200) % 20, 2, 8), Recipe(steps=3, lr=1e-2)
    plain, masked = small(), swap.HeadMask(small(), n=0)
    assert (train(plain, data, recipe).losses == train(masked, data, recipe).losses).all()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), masked.parameters(), strict=True))


@pytest.mark.parametrize("scope,each", [("global", None), ("per_layer", 1)])
def test_masks_so_many_heads_anew_at_every_step(scope: str, each: int | None):
    masked = swap.HeadMask(small(), n=2 if each is None else each, scope=scope).train()
    drawn = []
    for _ in range(12):
        masked(IDS, labels=IDS).loss.backward()
        drawn.append(tuple(masked.masked))
    assert {len(d) for d in drawn} == {2}
    assert len(set(drawn)) > 3
    if each is not None:
        assert {tuple(layer for layer, _ in d) for d in drawn} == {(0, 1)}
    again = swap.HeadMask(small(), n=2 if each is None else each, scope=scope).train()
    again(IDS, labels=IDS)
    assert tuple(again.masked) == drawn[0]


def test_a_masked_head_gives_nothing_and_learns_nothing():
    model = small()
    masked = swap.HeadMask(model, n=2).train()
    outputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.mechanism.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    masked(IDS, labels=IDS).loss.backward()
    for layer, head in [(n, h) for n in range(2) for h in range(4)]:
        rows = slice(4 * head, 4 * head + 4)
        off = (layer, head) in masked.masked
        assert (outputs[layer][..., rows] == 0).all() == off
        assert (model.blocks[layer].mechanism.v_proj.weight.grad[rows] == 0).all() == off


def test_all_heads_of_a_layer_off_leaves_its_bias():
    model = small()
    masked = swap.HeadMask(model, n=4)
    masked.masked = [(1, head) for head in range(4)]
    found: list[torch.Tensor] = []
    model.blocks[1].mechanism.register_forward_hook(lambda *args: found.append(args[-1]))
    with attend(model, edits=masked.edits()):
        model(IDS)
    bias = model.blocks[1].mechanism.o_proj.bias
    assert torch.equal(found[0], bias.expand_as(found[0]))


@pytest.mark.parametrize("make", [llama, small, t5])
def test_gradients_of_the_gates(make):
    model = make().train(False).double()
    kept: list[torch.Tensor] = []
    outs = [site.out for site in swap.head_mask.find_sites(model)]

    def keep(module: nn.Module, args: tuple) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    def loss() -> torch.Tensor:
        return model(input_ids=IDS, labels=IDS).loss

    found = swap.head_gradients(model, loss)
    assert all(p.grad is None for p in model.parameters())
    for module in outs:
        module.register_forward_pre_hook(keep)
    loss().backward()
    assert len(found) == len(kept)
    for gates, z in zip(found, kept, strict=True):
        by_hand = (z * z.grad).unflatten(-1, (4, -1)).sum((0, 1, 3)).abs()
        torch.testing.assert_close(gates.double(), by_hand, rtol=1e-5, atol=1e-9)


def test_the_most_important_heads_go():
    model = small()
    masked = swap.HeadMask(model, n=3, mode="impt").train()
    with torch.enable_grad():
        gates = torch.stack(swap.head_gradients(model, lambda: model(IDS, labels=IDS).loss))
    masked(IDS, labels=IDS)
    best = gates.flatten().topk(3).indices
    assert masked.masked == sorted((int(n) // 4, int(n) % 4) for n in best)


def test_both_passes_see_the_same_dropout():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout, self.seen = small(), nn.Dropout(0.5), []

        def forward(self, ids, labels):
            self.seen.append(self.dropout(torch.ones(30)))
            return self.inner(ids, labels=labels)

    model = Dropping()
    masked = swap.HeadMask(model, mode="impt").train()
    masked(IDS, labels=IDS)
    masked(IDS, labels=IDS)
    first, second, third, _ = model.seen
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_eval_is_the_model_itself_and_rescaling_makes_up():
    model = small()
    masked = swap.HeadMask(model, n=4, rescale=True)
    assert torch.equal(masked.eval()(IDS).logits, model(IDS).logits)
    found: list[torch.Tensor] = []
    model.blocks[0].mechanism.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    masked.train()(IDS)
    masked.eval()(IDS)
    kept = [head for head in range(4) if (0, head) not in masked.masked]
    off, on = (x.unflatten(-1, (4, 4))[..., kept, :] for x in found)
    torch.testing.assert_close(off, 2 * on)


def test_training_survives_a_copy():
    masked = swap.HeadMask(small(), mode="impt").train()
    masked(IDS, labels=IDS).loss.backward()
    other = copy.deepcopy(masked)
    assert all(any(site.module is m for m in other.model.modules()) for site in other.sites)


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"n: wanted 0 to 7 heads; got 8"):
        swap.HeadMask(small(), n=8)
    with pytest.raises(HeadwiseError, match=r"mode: rand or impt, scope: global or per_layer; got 'some'"):
        swap.HeadMask(small(), mode="some")
    with pytest.raises(HeadwiseError, match=r"Linear has no attention layer"):
        swap.HeadMask(nn.Linear(2, 2))
    with pytest.raises(HeadwiseError, match=r"wants a model whose output has a loss"):
        swap.HeadMask(small(), mode="impt").train()(IDS)
