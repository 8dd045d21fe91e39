"""A layer taught by the one it stands for, in a model that stays as it was."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.test_convert import qwen3

BATCHES = [{"input_ids": torch.randint(4, 32, (4, 12), generator=torch.Generator().manual_seed(n))} for n in range(4)]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def forget_output(conversion: swap.Conversion) -> None:
    """Random W_O in every mechanism."""
    torch.manual_seed(1)
    for mechanism in conversion.mechanisms.values():
        torch.nn.init.normal_(mechanism.o_proj.weight, std=0.02)


def test_a_forgotten_output_projection_is_learned_again_and_nothing_else_changes():
    model = llama().train()
    before = state(model)
    conversion = swap.convert(model, "attention")
    forget_output(conversion)
    losses = swap.distill(conversion, BATCHES, steps=80, lr=5e-3)
    assert losses.shape == (80, 2)
    assert list(losses.columns) == list(conversion.mechanisms)
    assert (losses.iloc[0] > 1).all()
    assert (losses.iloc[-4:].mean() < 0.05).all()
    assert all(conversion.model.get_submodule(name).mechanism is m for name, m in conversion.mechanisms.items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    conversion.undo()
    assert all(module.training for module in model.modules())
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_loss_is_that_of_the_layer_by_itself():
    """By hand in float64: the original's input and output caught by hooks, the mechanism run on them."""
    model = llama().double()
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []
    layers = [layer.self_attn for layer in model.model.layers]
    hooks = [
        layer.register_forward_hook(lambda m, a, k, out: caught.append((k["hidden_states"], out[0])), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        model(**BATCHES[0])
    for hook in hooks:
        hook.remove()
    conversion = swap.convert(model, "attention", position=swap.Rope())
    forget_output(conversion)
    wanted = []
    for mechanism, (x, y) in zip(conversion.mechanisms.values(), caught, strict=True):
        with torch.no_grad():
            wanted.append(float((mechanism(x) - y).square().sum() / y.square().sum()))
    losses = swap.distill(conversion, BATCHES, steps=1)
    assert losses.iloc[0].tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_copy_has_nothing_to_learn_and_padding_does_not_count():
    model = llama()
    conversion = swap.convert(model, "attention")
    mask = torch.tensor([[1] * 8 + [0] * 4] * 4)
    batch = {**BATCHES[0], "attention_mask": mask}
    other = {"input_ids": BATCHES[0]["input_ids"].clone(), "attention_mask": mask}
    other["input_ids"][:, 8:] = 5
    assert swap.distill(conversion, [batch]).to_numpy().max() < 1e-10
    losses = []
    for given in (batch, other):
        conversion.undo()
        conversion = swap.convert(model, "attention")
        forget_output(conversion)
        losses.append(swap.distill(conversion, [given], progress=True))
    assert losses[0].to_numpy() == pytest.approx(losses[1].to_numpy(), rel=1e-5)


def test_norms_of_the_host_are_copied_and_frozen_parts_stay():
    model = qwen3()
    before = state(model)
    conversion = swap.convert(model, "attention", layers=[1])
    forget_output(conversion)
    (mechanism,) = conversion.mechanisms.values()
    mechanism.v_proj.requires_grad_(False)
    frozen = mechanism.v_proj.weight.clone()
    losses = swap.distill(conversion, BATCHES, steps=20, lr=1e-2)
    assert losses.iloc[-1, 0] < losses.iloc[0, 0]
    assert torch.equal(mechanism.v_proj.weight, frozen)
    assert not torch.equal(mechanism.q_norm.weight, before["model.layers.1.self_attn.q_norm.weight"])
    conversion.undo()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_an_error_leaves_the_mechanisms_in_their_places():
    model = llama()
    conversion = swap.convert(model, "attention")
    with pytest.raises(ValueError, match="input_ids"):
        swap.distill(conversion, [{"colour": 1}])
    assert all(conversion.model.get_submodule(name).mechanism is m for name, m in conversion.mechanisms.items())
    assert not any(layer._forward_hooks for layer in conversion.originals.values())


def test_bad_input_is_refused_by_name():
    conversion = swap.convert(llama(), "attention")
    with pytest.raises(HeadwiseError, match=r"got 0 batches"):
        swap.distill(conversion, [])
    with pytest.raises(HeadwiseError, match=r"steps=0"):
        swap.distill(conversion, BATCHES, steps=0)
    for mechanism in conversion.mechanisms.values():
        mechanism.requires_grad_(False)
    with pytest.raises(HeadwiseError, match=r"no parameter"):
        swap.distill(conversion, BATCHES)
    conversion.undo()
    with pytest.raises(HeadwiseError, match=r"undone: model.layers.0.self_attn"):
        swap.distill(conversion, BATCHES)
