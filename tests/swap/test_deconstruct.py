"""The six ways to take attention apart, each against a readable form of what it says."""

from __future__ import annotations

import math

import pytest
import torch

from headwise import swap
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.study.hosts import Decoder
from headwise.study.swap_deconstruct import FIXED, conclude, deconstructing_attention, variants
from headwise.swap.parts import Places
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens

IDS = torch.tensor([[1, 5, 6, 7, 8, 9], [4, 11, 12, 5, 6, 13]])


def heads_of(linear: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def maps(model: torch.nn.Module, *args, **given) -> torch.Tensor:
    with torch.no_grad(), attend(model, [Map()]) as run:
        model(*args, **given)
    return torch.as_tensor(run.tree["text"].dataset["map"].values)


def test_an_mlp_does_not_see_other_tokens():
    layer, x = swap.GatedMLPMixer(DIM, HEADS).double(), tokens()
    rows = torch.cat([layer(part) for part in x.split(1, 1)], 1)
    torch.testing.assert_close(layer(x), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", ["joint", "per_order"])
def test_taylor_attention_is_what_the_paper_sums(normalize):
    torch.manual_seed(0)
    layer, x = swap.TaylorAttention(DIM, HEADS, causal=True, normalize=normalize).double(), tokens(1, 6)
    positions = torch.zeros(1, 6, dtype=torch.long)  # nothing is turned
    q, k, v = (heads_of(p, x)[0].detach() for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    wanted = torch.zeros(6, HEADS * 8, dtype=torch.float64)
    for h in range(HEADS):
        for i in range(6):
            s = [float(q[h, i] @ k[h, j]) / math.sqrt(8) for j in range(i + 1)]
            terms = [[s_j**n / math.factorial(n) for s_j in s] for n in range(3)]
            if normalize == "joint":
                weights = [sum(t) for t in zip(*terms, strict=True)]
                weights = [w / sum(weights) for w in weights]
            else:
                weights = [sum(t[j] / sum(t) for t in terms) for j in range(i + 1)]
            wanted[i, 8 * h : 8 * h + 8] = sum(w * v[h, j] for j, w in enumerate(weights))
    torch.testing.assert_close(layer(x, positions=positions)[0], layer.o_proj(wanted), rtol=0, atol=1e-10)


def test_joint_taylor_is_softmax_of_the_logarithm_of_the_polynomial():
    torch.manual_seed(0)
    layer, x = swap.TaylorAttention(DIM, HEADS, causal=True).double(), tokens(1, 6)
    here = layer.places(x, None, None)
    q, k, _ = layer.project(x, x, here)
    s = (q @ k.mT) / math.sqrt(8)
    s = (1 + s + s**2 / 2).log().masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(maps(layer, x).reshape(1, HEADS, 6, 6), s.softmax(-1).detach(), rtol=0, atol=1e-6)


def test_self_gate_is_a_running_sum():
    torch.manual_seed(0)
    layer, x = swap.SelfGateAttention(DIM, HEADS, causal=True).double(), tokens(1, 6)
    q, k, v = (heads_of(p, x)[0] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    e = (torch.nn.functional.silu(q) * k).sum(-1) / math.sqrt(8)
    top, total, below, rows = torch.tensor(-torch.inf).expand(HEADS), 0.0, 0.0, []
    for j in range(6):  # the paper's recurrence, with a running maximum
        new = torch.maximum(top, e[:, j])
        total = total * (top - new).exp()[:, None] + (e[:, j] - new).exp()[:, None] * v[:, j]
        below = below * (top - new).exp() + (e[:, j] - new).exp()
        top = new
        rows.append((total / below[:, None]).flatten())
    torch.testing.assert_close(layer(x)[0], layer.o_proj(torch.stack(rows)), rtol=0, atol=1e-12)


def small(source: str, length: int = 6, layers: int = 2) -> Decoder:
    torch.manual_seed(0)
    vectors = {"vectors": torch.randn(length, 16)} if source == "random" else {}
    how = {"source": source, "causal": True, "position": swap.Rope(), **vectors}
    return Decoder(lambda _: swap.FixedQKAttention(16, HEADS, **how), 20, 16, layers).double()


@pytest.mark.parametrize("source,text", [("random", None), ("text", torch.arange(3, 9))])
def test_fixed_maps_are_those_of_the_stream_itself(source, text):
    model = small(source)
    stream = swap.FixedStream(model, model.embed, text).eval()
    stream(input_ids=IDS)  # the stream's own pass
    shown = maps(stream, input_ids=IDS)
    assert torch.equal(shown, maps(stream, input_ids=IDS.flip(0, 1)))
    # slow: ordinary attention in all layers, run on the stream alone
    plain = Decoder(lambda _: swap.Attention(16, HEADS, causal=True, position=swap.Rope()), 20, 16, 2).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = model.embed(text)[None] if source == "text" else model.blocks[0].mechanism.vectors[None].double()
    wanted = []
    for block in plain.blocks:
        wanted.append(maps(block.mechanism, block.norm(x)).reshape(HEADS, 6, 6))
        x = block(x)
    torch.testing.assert_close(shown[0], torch.stack(wanted).to(shown), rtol=0, atol=1e-6)


def test_the_stream_takes_gradients_and_is_kept_in_eval_mode():
    model = small("random")
    stream = swap.FixedStream(model, model.embed)
    stream(input_ids=IDS, labels=IDS).loss.backward()
    assert model.blocks[1].mechanism.q_proj.weight.grad.abs().sum() > 0
    assert model.blocks[0].mechanism.v_proj.weight.grad.abs().sum() > 0
    stream.eval()
    with torch.no_grad():
        first = stream(input_ids=IDS).logits
        kept = model.blocks[1].mechanism.given[0]
        assert torch.equal(stream(input_ids=IDS).logits, first)
        assert model.blocks[1].mechanism.given[0] is kept
    stream.train()
    assert model.blocks[1].mechanism.given is None


def test_static_queries_know_the_token_alone():
    model = small("static")
    stream = swap.FixedStream(model, model.embed).eval()
    shown = maps(stream, input_ids=IDS[:1, :3])
    layer = model.blocks[1].mechanism
    x = torch.nn.functional.rms_norm(model.embed(IDS[:1, :3]), (16,))
    here = layer.places(x, None, None)
    q, k = (layer.position.turn(heads_of(p, x), here) for p in (layer.q_proj, layer.k_proj))
    s = (q @ k.mT / 2).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(shown.reshape(2, HEADS, 3, 3)[1], s[0].detach(), rtol=0, atol=1e-6)


def test_in_a_trained_model():
    model = llama(64)
    with torch.no_grad():
        plain = model(IDS).logits
        with swap.convert(model, "fixed_qk_attention", layers="odd", source="text"):
            text = torch.arange(4, 24)
            stream = swap.FixedStream(model, text=text).eval()
            whole = stream(input_ids=IDS).logits
            start = stream(input_ids=IDS[:, :4], use_cache=True)
            rest = stream(input_ids=IDS[:, 4:], past_key_values=start.past_key_values).logits
            torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=1e-5)
            assert not torch.allclose(whole, plain)
        for name in ("taylor_attention", "self_gate_attention", "gated_mlp_mixer"):
            with swap.convert(model, name, layers="even"):
                assert model(IDS).logits.isfinite().all()
        assert torch.equal(model(IDS).logits, plain)


def test_random_vectors_in_a_trained_model_are_turned_by_its_angles():
    """The maps are those of any input that is the vectors themselves, row by row as the host places it."""
    model, vectors = llama(64), 20 * torch.randn(9, 32)
    conversion = swap.convert(model, "fixed_qk_attention", layers=[0], source="random", vectors=vectors)
    (layer,) = conversion.mechanisms.values()
    places = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    angles = model.model.rotary_emb(vectors, places)
    inputs = vectors[places]
    given = {"positions": Places(places, 0, angles), "mask": torch.ones(2, 5, dtype=torch.bool)}
    plain = swap.Attention(32, 4, 2, causal=True, position=layer.position)
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs, **given), plain(inputs, **given), rtol=0, atol=1e-5)
        turned = plain(inputs, **{**given, "positions": Places(places)})
        assert not torch.allclose(layer(inputs, **given), turned, atol=1e-4)


def test_static_in_the_first_layer_of_a_trained_model_is_the_layer_itself():
    """By itself it takes its own input, which is what attention does."""
    model = llama(64)
    with torch.no_grad():
        plain = model(IDS).logits
        with swap.convert(model, "fixed_qk_attention", source="static"):
            torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=1e-6)


def test_bad_input_is_refused_by_name():
    with pytest.raises(HeadwiseError, match=r"source is random, text or static; got 'other'"):
        swap.FixedQKAttention(32, 4, source="other")
    with pytest.raises(HeadwiseError, match=r"vectors wants shape \[length, 32\]; got \(4, 8\)"):
        swap.FixedQKAttention(32, 4, vectors=torch.zeros(4, 8))
    with pytest.raises(HeadwiseError, match=r"the stream has no place 11: make it longer"):
        swap.FixedQKAttention(32, 4, length=8)(tokens().float())
    with pytest.raises(HeadwiseError, match=r"needs the FixedStream"):
        swap.FixedQKAttention(32, 4, source="text")(tokens().float())
    model = small("random")
    with pytest.raises(HeadwiseError, match=r"text=...\) goes with layers of source 'text'; these are 'random'"):
        swap.FixedStream(model, model.embed, torch.arange(4))
    with pytest.raises(HeadwiseError, match=r"layers of one source; got \[\]"):
        swap.FixedStream(llama())
    with pytest.raises(HeadwiseError, match=r"normalize is 'joint' or 'per_order'"):
        swap.TaylorAttention(32, 4, normalize="never")
    with pytest.raises(HeadwiseError, match=r"hidden must be at least 1; got 0"):
        swap.GatedMLPMixer(32, 4, hidden=0)
    with pytest.raises(HeadwiseError, match=r"leave out context"):
        swap.GatedMLPMixer(32, 4)(tokens().float(), context=tokens().float())


def test_the_study_runs():
    found = deconstructing_attention(seeds=(0,), steps=2, rows=2, layers=2)
    assert found.verdict == "untestable", "two steps teach nothing"
    assert len(found.measured["nats"]) == 22
    assert {f"{name}, skipped" for name in variants(8, 0)} <= set(found.measured["nats"])


def test_the_verdict_wants_the_order_the_hybrids_and_their_layers():
    uniform = {"approximate": 1.1, **dict.fromkeys(FIXED, 1.3), "mlp": 1.8, "non-approximate": 2.0}
    losses = {"standard": 1.0}
    for name, loss in uniform.items():
        losses |= {f"{name}, uniform": loss, f"{name}, hybrid": 1.1, f"{name}, skipped": 3.0}

    def verdict(pairs: float = 2.3, **changed: float) -> str:
        renamed = {name.replace("_", ", "): [loss] for name, loss in changed.items()}
        return conclude({name: [loss] for name, loss in losses.items()} | renamed, pairs, 1, 1, 4, (0,)).verdict

    assert verdict() == "holds"
    assert verdict(approximate_uniform=1.4) == "fails", "the order"
    assert verdict(mlp_hybrid=1.5) == "fails", "the hybrids"
    assert verdict(mlp_skipped=1.5) == "fails", "their layers"
    assert verdict(pairs=0.9) == "untestable"
