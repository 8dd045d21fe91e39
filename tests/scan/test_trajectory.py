"""Entropies and stable ranks over checkpoints."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import GPT2Config, GPT2LMHeadModel

from headwise.errors import HeadwiseError
from headwise.scan.trajectory import dip_and_rise, entropy_trajectory, stable_rank
from tests.scan.models import circuit, llama


def eager_entropy(model, inputs) -> np.ndarray:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        a = torch.stack(model(**inputs, output_attentions=True).attentions).double()
    model.set_attn_implementation("sdpa")
    return -torch.special.xlogy(a, a).sum(-1).mean((1, 3)).numpy()


def test_every_checkpoint_is_measured_on_the_same_inputs() -> None:
    first = llama().model
    second = deepcopy(first)
    with torch.no_grad():
        for layer in second.model.layers:
            layer.self_attn.q_proj.weight.mul_(3)
            layer.mlp.gate_proj.weight[1:] = 0
    inputs = {"input_ids": torch.arange(3, 43).reshape(2, 20)}
    found = entropy_trajectory(((step, model) for step, model in ((0, first), (10, second))), inputs)
    assert found["entropy"].dims == ("step", "layer", "head")
    assert found["step"].values.tolist() == [0, 10]
    wanted = [eager_entropy(model, inputs) for model in (first, second)]
    np.testing.assert_allclose(found["entropy"], wanted, atol=1e-5)
    rank = [stable_rank(layer.mlp.gate_proj.weight) for layer in first.model.layers]
    np.testing.assert_allclose(found["stable_rank"], [rank, [1, 1]], rtol=1e-6)


def test_the_lower_matrix_is_found_in_other_families_and_may_be_missing() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    found = entropy_trajectory([(5, gpt2)], {"input_ids": torch.arange(8)[None]})
    np.testing.assert_allclose(found["stable_rank"][0], [stable_rank(b.mlp.c_fc.weight) for b in gpt2.transformer.h])
    bare = entropy_trajectory([(0, circuit())], {"input_ids": torch.arange(8)[None]})
    assert np.isnan(bare["stable_rank"]).all()


def test_stable_rank_of_known_matrices() -> None:
    assert stable_rank(torch.eye(6)) == pytest.approx(6)
    assert stable_rank(torch.outer(torch.arange(4.0), torch.ones(3))) == pytest.approx(1)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(1.5)
    assert stable_rank(torch.zeros(3, 3)) == 0
    with pytest.raises(HeadwiseError, match=r"a matrix; got a tensor of shape \(3,\)"):
        stable_rank(torch.ones(3))


def test_dip_and_rise_of_known_curves() -> None:
    curves = xr.DataArray([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], {"step": [0, 5, 9]}, ("curve", "step"))
    found = dip_and_rise(curves)
    assert found["dip"].values.tolist() == [2, 2, 0]
    assert found["rise"].values.tolist() == [1, 0, 2]
    assert found["lowest"].values.tolist() == [5, 9, 0]


def test_checkpoints_out_of_order_are_refused() -> None:
    model, inputs = llama().model, {"input_ids": torch.arange(8)[None]}
    with pytest.raises(HeadwiseError, match=r"rising steps; got steps \[4, 1\]"):
        entropy_trajectory([(4, model), (1, model)], inputs)
    with pytest.raises(HeadwiseError, match=r"got steps \[\]"):
        entropy_trajectory([], inputs)
