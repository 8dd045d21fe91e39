"""Memories found by product keys, and decoders made deeper with them."""

from __future__ import annotations

import pytest
import torch
import transformers

from headwise import swap
from headwise.attention import Mass, attend
from headwise.errors import HeadwiseError
from headwise.study.swap_upscale import memory_upscaling
from tests.models.tiny import llama, t5
from tests.swap.test_convert import gpt2

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10], [1, 11, 12, 5, 6, 13, 14]])
MEMORY = {"n": 4, "topk": 3}


def memory(**own) -> swap.ProductKeyMemory:
    torch.manual_seed(0)
    made = swap.ProductKeyMemory(3, 8, n=6, topk=4, value_rank=5, out_dim=7, **own).double()
    with torch.no_grad():
        made.values.normal_()
    return made


def qwen3() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, pad_token_id=3, sliding_window=4, use_sliding_window=True, max_window_layers=1,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("own", [{}, {"shared_values": False}, {"shared_keys": True, "query_norm": False}])
def test_product_keys_find_the_best_slots_and_read_them(own):
    made, z = memory(**own), torch.randn(2, 5, 3, 8, dtype=torch.float64)
    read, slots, weights = made(z)
    for b in range(2):
        for t in range(5):
            for h in range(3):
                query = z[b, t, h]
                if made.query_norm:
                    query = query / query.square().mean().sqrt()
                one, two = made.sub_keys[:, 0 if own.get("shared_keys") else h]
                every = torch.stack([one[a] @ query[:4] + two[c] @ query[4:] for a in range(6) for c in range(6)])
                best = every.topk(4)
                assert set(slots[b, t, h].tolist()) == set(best.indices.tolist())
                bank = made.values[0 if made.values.shape[0] == 1 else h]
                value = bank @ made.expand[h]
                wanted = sum(w * value[i] for w, i in zip(best.values.softmax(0), best.indices, strict=True))
                torch.testing.assert_close(read[b, t, h], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_only_the_slots_that_are_read_get_gradients():
    made = memory()
    read, slots, _ = made(torch.randn(1, 2, 3, 8, dtype=torch.float64))
    read.square().sum().backward()
    touched = made.values.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == sorted(set(slots.flatten().tolist()))
    assert made.sub_keys.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [llama, qwen3])
@pytest.mark.parametrize("kind", ["memory", "identity_copy"])
def test_starts_as_the_model_it_was(make, kind):
    model = make()
    count = model.config.num_hidden_layers
    with torch.no_grad():
        plain = model(IDS).logits
        padded = model(IDS, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])).logits
        with swap.depth_upscale(model, every=1, kind=kind, **(MEMORY if kind == "memory" else {})) as upscaled:
            assert upscaled.places == list(range(1, 2 * count, 2))
            torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=1e-6)
            again = model(IDS, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])).logits
            torch.testing.assert_close(again[0, 2:], padded[0, 2:], rtol=0, atol=1e-6)
            numbers = [layer.self_attn.layer_idx for layer in model.model.layers]
            assert numbers == list(range(2 * count))
            assert model.config.num_hidden_layers == 2 * count
            trained = {id(p) for p in model.parameters() if p.requires_grad}
            assert trained == {id(p) for block in upscaled.blocks for p in block.parameters()}
        assert torch.equal(model(IDS).logits, plain)
        assert model.config.num_hidden_layers == len(model.model.layers) == count
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [lambda: llama(64), qwen3])
def test_decodes_through_caches_after_training(make):
    model = make()
    upscaled = swap.depth_upscale(model, [0, 1], **MEMORY)
    with torch.no_grad():
        for block in upscaled.blocks:
            block.memory.values.normal_()
        whole = model(IDS).logits
        first = model(IDS[:, :4], use_cache=True)
        assert len(first.past_key_values.layers) == len(model.model.layers)
        rest = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=1e-5)
    both = [model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*both)


def test_layers_that_are_called_by_place():
    """GPT-2 hands its layers the cache and the mask by place."""
    model = gpt2()
    upscaled = swap.depth_upscale(model, every=1, **MEMORY)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        for block in upscaled.blocks:
            block.memory.values.normal_()
        whole, padded = model(IDS).logits, model(IDS, attention_mask=mask).logits
        first = model(IDS[:, :4], use_cache=True)
        rest = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
        alone = model(IDS[:1, 2:], position_ids=torch.arange(2, 7)[None]).logits
        shown = model(IDS, attention_mask=mask, position_ids=torch.arange(7)[None]).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=1e-5)
    torch.testing.assert_close(shown[:1, 2:], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(padded[0], whole[0])


def test_a_memory_sees_no_later_token_and_learns():
    model = llama(64)
    upscaled = swap.depth_upscale(model, every=1, **MEMORY)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        other = IDS.clone()
        other[:, 5:] = 20
        plain = model(IDS).logits
        torch.testing.assert_close(model(other).logits[:, :5], plain[:, :5], rtol=0, atol=1e-5)
        for block in upscaled.blocks:
            block.gain[1] = 0.0
        assert not torch.allclose(model(IDS).logits, plain, atol=1e-3)


def test_copies_are_whole_layers():
    model = llama(64)
    with swap.depth_upscale(model, [1], kind="copy", train="all"):
        assert len(model.model.layers) == 3
        assert torch.equal(model.model.layers[2].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
        assert all(p.requires_grad for p in model.parameters())


def test_a_scan_sees_the_attention_of_memory_blocks():
    model = llama(64)
    with swap.depth_upscale(model, [0], **MEMORY), attend(model, [Mass(("first",))]) as run, torch.no_grad():
        model(IDS)
    assert run.tree["text"].dataset["mass"].sizes["layer"] == 3


def test_bad_input_is_refused_by_name():
    with pytest.raises(HeadwiseError, match=r"an even key_dim, and topk from 1 to n; got heads=2, key_dim=7"):
        swap.ProductKeyMemory(2, 7)
    with pytest.raises(HeadwiseError, match=r"at wants numbers from 0 to 1; got \[5\]"):
        swap.depth_upscale(llama(), [5])
    with pytest.raises(HeadwiseError, match=r"kind 'other'"):
        swap.depth_upscale(llama(), kind="other")
    with pytest.raises(HeadwiseError, match=r"n are of memories; kind is 'copy'"):
        swap.depth_upscale(llama(), kind="copy", n=4)
    with pytest.raises(HeadwiseError, match=r"T5ForConditionalGeneration is no decoder of transformers"):
        swap.depth_upscale(t5())
    with pytest.raises(HeadwiseError, match=r"every must be at least 1; got 0"):
        swap.depth_upscale(llama(), every=0)


def test_the_study_runs():
    found = memory_upscaling(seeds=(0,), steps=2, more=2, rows=2)
    assert found.verdict in ("holds", "fails")
    sizes = found.measured["trained_parameters"]
    assert 0.7 < sizes["memory"] / sizes["identity copy"] < 1
    assert len(found.measured["nats_lost_without_a_head"][0]) == 2
