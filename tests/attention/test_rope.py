"""Rebase: one base for all or one a row, against the rotation written out and against models made with that base."""

import copy

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import headwise as hw
from headwise.attention import force_path
from headwise.attention.call import AttentionCall
from headwise.attention.rope import Rotary, find_rotary, rebase
from headwise.errors import HeadwiseError

IDS = torch.randint(3, 99, (3, 14), generator=torch.Generator().manual_seed(0))
BASES = torch.tensor([10000.0, 500.0, 90.0])
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def llama(theta: float = 10000.0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "rope_parameters": rope, **changes})
    return LlamaForCausalLM(config).eval().double()


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **kw: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kw).logits


@pytest.mark.parametrize("path", [None, "dense", "stream"])
def test_one_base_a_row_is_each_row_alone(path: str | None) -> None:
    model = llama()
    plain = logits(model)
    alone = []
    for row, base in enumerate(BASES.tolist()):
        with hw.attend(model, edits=[hw.Rebase(theta=base)]):
            alone.append(logits(model, IDS[row : row + 1]))
    edit = [hw.Rebase(theta=BASES)]
    if path is None:
        with hw.attend(model, edits=edit) as run:
            found = logits(model)
        assert "library" in run.explain()
    else:
        with force_path(path), hw.attend(model, edits=edit):
            found = logits(model)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-10, rtol=1e-10)
    assert (found - plain).abs().amax((1, 2))[1:].min() > 1e-3


def test_a_row_with_the_models_own_base_stays_bit_for_bit() -> None:
    for model in (llama(), llama().float(), llama(rope_parameters=SCALED).float()):
        with hw.attend(model, edits=[hw.Rebase(theta=BASES)]):
            found = logits(model)
        with hw.attend(model):
            assert torch.equal(found[0], logits(model)[0])


def test_rows_repeat_where_the_batch_holds_several_groups() -> None:
    model = llama()
    with hw.attend(model, edits=[hw.Rebase(theta=BASES)]):
        once, twice = logits(model), logits(model, IDS.repeat(2, 1))
        torch.testing.assert_close(twice, once.repeat(2, 1, 1), atol=1e-12, rtol=1e-12)
        with pytest.raises(HeadwiseError, match="3 bases, but the batch has 2 rows"):
            logits(model, IDS[:2])


@pytest.mark.parametrize("scaling", [None, SCALED], ids=["plain", "llama3"])
def test_it_is_the_model_made_with_that_base(scaling: dict | None) -> None:
    """The scaling is done after the base was changed. The models' own angles are in single precision."""
    own = llama() if scaling is None else llama(rope_parameters=scaling)
    with hw.attend(own, edits=[hw.Rebase(theta=BASES)]):
        found = logits(own)
    for row, base in enumerate(BASES.tolist()):
        other = llama(base) if scaling is None else llama(rope_parameters={**scaling, "rope_theta": base})
        assert torch.equal(other.lm_head.weight, own.lm_head.weight)
        torch.testing.assert_close(found[row], logits(other)[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (CohereForCausalLM, CohereConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
    ],
    ids=["neighbours", "some channels"],
)
def test_other_ways_to_rotate(kind: type, config: object) -> None:
    models = []
    for theta in (10000.0, 500.0):
        torch.manual_seed(0)
        changed = copy.deepcopy(config)
        rope = {"rope_theta": theta, "partial_rotary_factor": 0.5}
        changed.rope_parameters = {**changed.rope_parameters, **rope}  # type: ignore[attr-defined]
        models.append(kind(changed).eval().double())
    with hw.attend(models[0], edits=[hw.Rebase(theta=500.0)]):
        found = logits(models[0])
    torch.testing.assert_close(found, logits(models[1]), atol=1e-4, rtol=1e-4)
    assert (found - logits(models[0])).abs().max() > 1e-3


def test_left_padding_and_a_cache_change_nothing() -> None:
    model = llama()
    with hw.attend(model, edits=[hw.Rebase(theta=BASES)]), torch.no_grad():
        whole = logits(model)
        first = model(IDS[:, :9], use_cache=True)
        rest = model(IDS[:, 9:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 9:], atol=1e-6, rtol=1e-6)
        padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), IDS], 1)
        mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(IDS)], 1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        moved = logits(model, padded, attention_mask=mask, position_ids=position)[:, 4:]
    torch.testing.assert_close(moved, whole, atol=1e-5, rtol=1e-5)


def test_turning_there_and_back_is_the_identity_and_scores_know_only_the_distance() -> None:
    torch.manual_seed(0)
    freq = 10000.0 ** (-torch.arange(4).double() / 4)
    q, k, v = (torch.randn(2, 2, 7, 10).double() for _ in range(3))
    call = AttentionCall(q, k, v, 1.0, rotary=Rotary(freq, True))
    there = rebase(call, hw.Rebase(theta=torch.tensor([50.0, 700.0])), [0, 1])
    back_freq = Rotary(50.0 ** (-torch.arange(4).double() / 4), True)
    there.rotary = back_freq
    back = rebase(there, hw.Rebase(theta=10000.0), [0, 1])
    torch.testing.assert_close(back.q[0], q[0], atol=1e-12, rtol=1e-12)
    assert torch.equal(there.q[..., 8:], q[..., 8:]), "channels that are not rotated stay"
    for row, theta in enumerate((50.0, 700.0)):
        for i in range(7):
            for j in range(7):
                z, w = (torch.view_as_complex(x[row, 0, n, :8].view(4, 2).clone()) for x, n in ((q, i), (k, j)))
                turned = (
                    z * w.conj() * torch.exp(1j * (i - j) * (theta ** (-torch.arange(4).double() / 4) - freq))
                ).sum()
                expected = turned.real + q[row, 0, i, 8:] @ k[row, 0, j, 8:]
                assert float(there.q[row, 0, i] @ there.k[row, 0, j]) == pytest.approx(float(expected), abs=1e-9)


def test_a_models_own_base() -> None:
    model = llama(700.0)
    found = find_rotary(model, model.model.layers[0].self_attn)
    assert found is not None
    assert found.base == 700
    assert Rotary(found.inv_freq, False).base == pytest.approx(700, rel=1e-5)
    torch.testing.assert_close(Rotary(found.inv_freq, False).frequencies(700.0), found.inv_freq)


@pytest.mark.parametrize("theta", [1.0, torch.tensor([]), torch.tensor([[2.0]]), torch.tensor([1e4, 0.5])])
def test_bad_bases_are_named(theta: object) -> None:
    with pytest.raises(HeadwiseError, match=r"Rebase\(theta=...\) must be one base or a vector of them, above 1"):
        hw.Rebase(theta=theta)  # type: ignore[arg-type]


def test_a_rotation_that_changes_with_the_length_is_refused() -> None:
    model = llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(HeadwiseError, match="dynamic rotation"), hw.attend(model, edits=[hw.Rebase(theta=500.0)]):
        logits(model)
