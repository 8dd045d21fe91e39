"""The studies of roles and of erasure run end to end on small models, and their parts measure what they say."""

import numpy as np
import pytest
import torch
from tests.scan.models import bert, llama

from headwise import scan
from headwise.scan import quiz
from headwise.study.erasure import attended, attention_and_erasure, erased, spearman
from headwise.study.roles import (
    among_layers,
    depth_of_functions,
    first_token,
    kappa,
    name_movers_matter,
    preference,
    roles_stable,
    stages_by_depth,
)


def test_kappa_is_agreement_beyond_chance() -> None:
    one = np.array(["a", "a", "b", "b"])
    assert kappa(one, one) == 1
    assert kappa(one, np.array(["b", "b", "a", "a"])) == -1
    assert kappa(one, np.array(["a", "b", "a", "b"])) == 0
    assert kappa(np.array(["a"] * 3), np.array(["a"] * 3)) == 1


def test_shuffling_keeps_the_roles_of_every_layer() -> None:
    layers = np.repeat([0, 1, 2], 20)
    roles = np.array([f"{layer}{n % 4}" for n, layer in enumerate(layers)])
    mixed = among_layers(roles, layers, np.random.default_rng(0))
    assert (mixed != roles).any()
    for layer in range(3):
        assert sorted(mixed[layers == layer]) == sorted(roles[layers == layer])


def test_roles_of_random_models_are_measured() -> None:
    found = roles_stable([llama(), bert()], texts=2, length=64)
    assert found.verdict == "fails", "a random model has no previous-token head"
    for measured in found.measured.values():
        assert -1 <= measured["kappa"] <= 1
        assert sum(measured["roles"].values()) == 8


def test_depths_of_functions_by_hand() -> None:
    result = scan.heads(llama(num_hidden_layers=6), questions=["induction_heads"])
    result.data["induction_heads"][:] = torch.arange(6.0)[None, :, None].expand(1, 6, 4).numpy()
    depths = depth_of_functions(result)
    assert depths["induction"] == ("LR", pytest.approx((5 * 4 + 4) / 5 / 5))
    assert "iteration" not in depths


def test_stages_are_compared_by_depth() -> None:
    found = stages_by_depth(llama(), length=64, questions=("positional_heads", "induction_heads", "name_movers"))
    assert 0 <= found.measured["chance"] <= 1
    assert found.measured["functions"]["ICI"] >= 3
    gap = found.measured["mean_depth"]["LR"] > found.measured["mean_depth"]["ICI"]
    first = found.measured["depth"]["previous token"] < found.measured["depth"]["induction"]
    assert found.verdict == ("holds" if gap and first else "fails")


def test_silencing_nothing_changes_no_preference(monkeypatch) -> None:
    monkeypatch.setattr(quiz, "NAMES", ("Bennet", "Bingley", "Elizabeth", "Jane", "Lydia", "Lucas"))
    opened = llama()
    prompts = quiz.gifts(opened, 2, 0)
    np.testing.assert_array_equal(preference(opened, prompts), preference(opened, prompts, []))
    assert (preference(opened, prompts, [(0, 0), (1, 1)]) != preference(opened, prompts)).any()
    found = name_movers_matter(opened, seeds=[0], prompts=2, silenced=2)
    assert {"loss", "loss_random", "right"} <= set(found.measured)


def test_the_first_token_of_a_name_is_the_one_after_the_text() -> None:
    opened = llama()
    assert opened.tokenizer.decode([first_token(opened, "Elizabeth")]) == "Elizabeth"


def test_erasing_a_token_is_masking_its_key() -> None:
    opened = llama()
    ids = torch.tensor([5, 9, 13, 17, 21, 25])
    found = erased(opened, ids)
    assert found.shape == (5,)
    assert (found[1:] > 0).all()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        whole, without = (
            opened.model(input_ids=ids[None], attention_mask=m).logits[0, -1].double().log_softmax(-1)
            for m in (torch.ones_like(mask), mask)
        )
    assert found[2] == pytest.approx((whole.exp() * (whole - without)).sum().item(), rel=1e-3)


def test_attention_from_the_last_token_leaves_out_itself() -> None:
    seen = attended(llama(), torch.tensor([5, 9, 13, 17]))
    assert seen.shape == (3,)
    assert 0 < seen.sum() < 1


def test_the_erasure_study_measures_both_controls() -> None:
    found = attention_and_erasure(llama(), texts=3, length=12)
    assert {"spearman", "spearman_nearness", "spearman_other_window", "first_token"} <= set(found.measured)
    assert spearman(np.arange(5), np.arange(5) ** 2) == pytest.approx(1)
    assert spearman(np.ones(5), np.arange(5)) == 0
