"""Heads built to keep to patterns, in encoders of their own and beside a trained one."""

from __future__ import annotations

import pytest
import torch
import transformers

from headwise import swap
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.study.swap_patterned import patterned_encoder, patterned_pals
from headwise.swap.patterned import attention, keys_of_patterns
from tests.models.tiny import llama

IDS = torch.tensor([[1, 5, 6, 5, 7, 2, 8, 5, 2, 0], [1, 9, 9, 4, 3, 2, 4, 3, 3, 2]])
SENTENCES = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
VALID = torch.arange(10) < torch.tensor([[9], [10]])
SPECIAL = (0, 1, 2)


def bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


def test_the_keys_of_patterns_one_by_one():
    patterns = ("matching", "same", "offset:-1", "offset:+1", None)
    seen = keys_of_patterns(patterns, IDS, SENTENCES, VALID, SPECIAL)
    rules = {
        "matching": lambda b, i, j: IDS[b, i] == IDS[b, j] and i != j and IDS[b, i] not in SPECIAL,
        "same": lambda b, i, j: SENTENCES[b, i] == SENTENCES[b, j],
        "offset:-1": lambda b, i, j: j == i - 1,
        "offset:+1": lambda b, i, j: j == i + 1,
        None: lambda b, i, j: True,
    }
    for b in range(2):
        for h, name in enumerate(patterns):
            for i in range(10):
                row = [bool(VALID[b, j]) and bool(rules[name](b, i, j)) for j in range(10)]
                assert seen[b, h, i].tolist() == (row if any(row) else VALID[b].tolist())
    assert seen.any(-1).all()


def test_an_offset_head_gives_the_value_before():
    torch.manual_seed(0)
    layer = attention(32, ("offset:-1", None)).double()
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    seen = keys_of_patterns(("offset:-1", None), IDS)
    with torch.no_grad():
        layer.o_proj = torch.nn.Identity()
        v = layer.v_proj(x)[..., :16]
        torch.testing.assert_close(layer(x, mask=seen)[:, 1:, :16], v[:, :-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(x, mask=seen)[:, 0, :16], v.mean(1), rtol=0, atol=1e-12)
        free = keys_of_patterns((None, None), IDS)
        plain = swap.Attention(32, 2, bias=True).double()
        plain.load_state_dict(layer.state_dict(), strict=False)
        plain.o_proj = torch.nn.Identity()
        torch.testing.assert_close(layer(x, mask=free)[..., 16:], plain(x)[..., 16:], rtol=0, atol=1e-12)


def test_maps_of_an_encoder_keep_to_its_patterns():
    torch.manual_seed(0)
    encoder = swap.PatternedEncoder(32, 36, 9, 2, 16, heads_per_pattern=2, special=SPECIAL).eval()
    assert encoder.patterns == (*swap.PATTERNS * 2, None)
    with torch.no_grad(), attend(encoder, [Map()]) as run:
        encoder(IDS, SENTENCES, VALID)
    maps = torch.as_tensor(run.tree["text"].dataset["map"].values)  # sample, layer, head, query, key
    outside = ~keys_of_patterns(encoder.patterns, IDS, SENTENCES, VALID, SPECIAL)
    assert (maps.movedim(1, 0)[:, outside] == 0).all()
    free = swap.PatternedEncoder(32, 36, 9, 2, 16, heads_per_pattern=0)
    assert sum(p.numel() for p in free.parameters()) == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("patterns", [None, swap.PATTERNS])
def test_pals_start_as_the_encoder_and_learn_alone(patterns):
    model = bert()
    with torch.no_grad():
        plain = model(IDS, attention_mask=VALID.long()).last_hidden_state
    pals = swap.PALEncoder(model, width=16, patterns=patterns, special=SPECIAL).eval()
    found = pals(IDS, sentences=SENTENCES, attention_mask=VALID.long()).last_hidden_state
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    found.square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert pals.pals[0].up.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for pal in pals.pals:
            pal.up.weight.normal_()
        other = pals(IDS, sentences=SENTENCES, attention_mask=VALID.long()).last_hidden_state
        assert not torch.allclose(other, plain, atol=1e-2)
        assert torch.equal(model(IDS, attention_mask=VALID.long()).last_hidden_state, plain)


def test_bad_input_is_refused_by_name():
    with pytest.raises(HeadwiseError, match=r"wanted matching, same, offset:N or None for each of 4 heads"):
        swap.PAL(32, 16, 4, patterns=("near", None, None, None))
    with pytest.raises(HeadwiseError, match=r"4 patterns in 3 heads each don't go into 8 heads"):
        swap.PatternedEncoder(32, 32, 8, 1, 16, heads_per_pattern=3)
    with pytest.raises(HeadwiseError, match=r"wants the sentences"):
        swap.PatternedEncoder(32, 32, 4, 1, 16)(IDS)
    with pytest.raises(HeadwiseError, match=r"PALEncoder wants an encoder of transformers; got LlamaForCausalLM"):
        swap.PALEncoder(llama())


def test_the_studies_run():
    found = patterned_encoder(seeds=(0,), steps=2, rows=2, tests=4)
    assert found.verdict in ("holds", "fails", "untestable")
    assert set(found.measured["f1"]) == {"0", "1", "2"}
    found = patterned_pals(seeds=(0,), steps=2, more=2, rows=2, tests=4)
    assert set(found.measured["f1"]) == {"base", "pals", "pals with patterns"}
