"""The trainer: determinism, schedules, checkpoints, what it refuses."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from headwise import HeadwiseError
from headwise.study.train import Recipe, build, characters, loss_of, train, windows


class Slope(nn.Module):
    """y = w x, squared error; the gradient of w is -2 mean(x (y - w x))."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x, y):
        return SimpleNamespace(loss=((y - self.w * x) ** 2).mean())


def three(generator):
    x = torch.randn(8, generator=generator)
    return {"x": x, "y": 3 * x}


def cycle(length: int = 500) -> torch.Tensor:
    return torch.arange(length) % 5


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=5,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=0.1,
        )
    )


def test_sgd_makes_exactly_the_updates_of_its_schedule() -> None:
    recipe = Recipe(steps=6, lr=0.1, optimizer="sgd", warmup=2, decay="cosine", clip=None, seed=4)
    trained = train(Slope(), three, recipe, keep=(0, 3, 6))
    generator = torch.Generator().manual_seed(4)
    w, path, losses = 0.0, [0.0], []
    for step in range(6):
        x = torch.randn(8, generator=generator).double().numpy()
        rate = 0.1 * (step + 1) / 2 if step < 2 else 0.05 * (1 + math.cos(math.pi * (step - 2) / 4))
        losses.append(np.mean((3 * x - w * x) ** 2))
        w += rate * 2 * np.mean(x * (3 * x - w * x))
        path.append(w)
    np.testing.assert_allclose(trained.losses, losses, rtol=1e-5)
    assert [step for step, _ in trained.each()] == [0, 3, 6]
    np.testing.assert_allclose([m.w.item() for _, m in trained.each()], [path[0], path[3], path[6]], rtol=1e-5)
    assert trained.at(6).w.item() == trained.model.w.item()
    assert trained.model.frozen.item() == 1


def test_a_seed_decides_everything_and_leaves_the_callers_chance_alone() -> None:
    data = windows(cycle(), rows=4, length=12)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = (
        train(build(llama, seed), data, Recipe(steps=5, lr=1e-2, seed=seed)).losses for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.tolist() == again.tolist() != other.tolist()


def test_a_tiny_model_learns_a_cycle() -> None:
    data = windows(cycle(), rows=8, length=16)
    trained = train(build(llama), data, Recipe(steps=150, lr=1e-2, warmup=10))
    assert trained.losses[0] == pytest.approx(math.log(5), abs=0.3)
    assert loss_of(trained.model, data, batches=2, seed=9) < 0.1
    assert not trained.model.training


def test_windows_are_places_of_the_stream() -> None:
    batch = windows(torch.arange(50), rows=20, length=7)(torch.Generator().manual_seed(0))["input_ids"]
    assert batch.shape == (20, 7)
    assert (batch.diff(dim=1) == 1).all()
    ids, alphabet = characters("abba c")
    assert "".join(alphabet[n] for n in ids) == "abba c"
    assert alphabet == " abc"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Recipe(steps=0, lr=1.0), "steps=0"),
        (lambda: Recipe(steps=1, lr=1.0, optimizer="lion"), "'lion'"),
        (lambda: train(Slope(), three, Recipe(steps=2, lr=0.1), keep=(3,)), r"0 to 2 updates; got \[3\]"),
        (lambda: train(Slope(), three, Recipe(steps=2, lr=0.1), keep=(1,)).at(2), r"\[1\] updates; got 2"),
        (lambda: windows(cycle(3), rows=1, length=4), "3 tokens, fewer than the 4"),
        (lambda: train(Slope(), three, Recipe(steps=99, lr=1e9, optimizer="sgd", clip=None)), "lower the lr"),
    ],
)
def test_what_cannot_be_is_refused(wrong, said) -> None:
    with pytest.raises(HeadwiseError, match=said):
        wrong()
