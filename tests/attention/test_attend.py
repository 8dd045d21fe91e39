"""`attend` on whole models: what it gives, and that it leaves no trace."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaModel

import headwise as hw
from headwise.attention import force_path

IDS = torch.randint(0, 99, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaves_no_trace_after_an_exception(llama: LlamaForCausalLM, error: type[BaseException]) -> None:
    before = logits(llama)

    def interrupt(s: torch.Tensor) -> torch.Tensor:
        raise error

    with pytest.raises(error), hw.attend(llama, edits=[hw.ScoreMap(interrupt)]):
        logits(llama)
    assert torch.equal(before, logits(llama))
    assert llama.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


ZERO = {
    "HeadGain(1)": hw.HeadGain(gain=1.0),
    "ScoreBias(0)": hw.ScoreBias(0.0, keys="first"),
    "ScoreBias(vector of 0)": hw.ScoreBias(1.0, keys=torch.zeros(20)),
    "ScoreMap(identity)": hw.ScoreMap(lambda s: s),
    "Reweight(1)": hw.Reweight(torch.ones_like, groups=("first", "rest")[1:]),
    "Blend(0)": hw.Blend(0.0, target="uniform"),
    "Shift(0)": hw.Shift(q=torch.zeros(8), k=torch.zeros(8)),
    "Rebase(own base)": hw.Rebase(theta=10000.0),
    "Rebase(own positions)": hw.Rebase(positions=torch.arange(20)),
}


@pytest.mark.parametrize("path", ["dense", "stream"])
@pytest.mark.parametrize("name", ZERO)
def test_the_limit_case_of_an_edit_is_plain_attention(llama: LlamaForCausalLM, name: str, path: str) -> None:
    with force_path(path), hw.attend(llama, edits=[ZERO[name]]):
        edited = logits(llama)
    assert (edited - logits(llama)).abs().max() < 1e-5


EDITS = {
    "HeadGain": hw.HeadGain(layer=1, heads=[1, 3], gain=0.0),
    "HeadGain(mean)": hw.HeadGain(heads=[(0, 1), (2, 0)], gain="mean"),
    "HeadGain(resample)": hw.HeadGain(layer=0, gain="resample"),
    "HeadGain(tensor)": hw.HeadGain(layer=0, heads=[2], gain=torch.ones(8)),
    "HeadGain(tokens)": hw.HeadGain(layer=0, gain=0.0, tokens="first"),
    "ScoreBias": hw.ScoreBias(math.log(3.0), keys="first"),
    "knockout": hw.ScoreBias(-math.inf, keys="previous", heads=[0]),
    "ScoreMap": hw.ScoreMap(lambda s: 2 * s, keys="rest", heads=[1]),
    "ScoreMap(placed)": hw.ScoreMap(lambda s, i, j: s - 0.5 * (i - j), placed=True, heads=[0, 3]),
    "Reweight": hw.Reweight(lambda m: 0.5 / m.clamp(min=1e-6), groups=("first",)),
    "Blend(own)": hw.Blend(0.3, target="own", heads=[2]),
    "Blend(mean)": hw.Blend(0.3, target="mean"),
    "Blend(uniform)": hw.Blend(0.3, target="uniform"),
    "Blend(tensor)": hw.Blend(torch.tensor([0.3, 1.0]), target=torch.ones(2, 8), layer=1, heads=[0, 2], tokens="rest"),
    "Reweight(others)": hw.Reweight(lambda m: m.flip(-1).clamp(0.1, 2.0), groups=("first", "*")),
    "Reweight(set)": hw.Reweight(lambda m: 1 / (1 + m), groups=torch.arange(20) % 2 == 0),
    "Shift": hw.Shift(q=torch.ones(8), heads=[0, 1]),
    "Rebase": hw.Rebase(theta=500.0, heads=[3]),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_takes_effect_the_same_on_every_path(llama: LlamaForCausalLM, name: str) -> None:
    found = []
    for path in ("dense", "stream", None):
        if path is None:
            with hw.attend(llama, edits=[EDITS[name]]):
                found.append(logits(llama))
        else:
            with force_path(path), hw.attend(llama, edits=[EDITS[name]]):
                found.append(logits(llama))
    plain = logits(llama)
    assert all((f - plain).abs().max() > 1e-4 for f in found)
    assert all((f - found[0]).abs().max() < 1e-4 for f in found)


def test_ablating_a_head_is_taking_its_part_from_the_residual_stream(llama: LlamaForCausalLM) -> None:
    layer = llama.model.layers[1].self_attn
    seen: dict[str, torch.Tensor] = {}

    def drop(module: nn.Module, args: tuple) -> tuple:
        z = args[0].clone()
        z[..., 8:16] = 0
        seen["z"] = args[0][..., 8:16]
        return (z,)

    handle = layer.o_proj.register_forward_pre_hook(drop)
    by_hand = logits(llama)
    handle.remove()
    with hw.attend(llama, edits=[hw.HeadGain(layer=1, heads=[1], gain=0.0)]):
        assert torch.allclose(logits(llama), by_hand, atol=1e-5)
    wanted = [hw.HeadOutput(what="residual_norm", layers=1, heads=1), hw.HeadOutput(what="vector", layers=1, heads=1)]
    with hw.attend(llama, readings=wanted) as run:
        logits(llama)
    tree = run.tree["text"]
    np.testing.assert_allclose(tree["head_output"].values[:, 0, 0], seen["z"].numpy(), atol=1e-5)
    part = (seen["z"] @ layer.o_proj.weight[:, 8:16].T).norm(dim=-1)
    np.testing.assert_allclose(tree["residual_norm"].values[:, 0, 0], part.detach().numpy(), atol=1e-4)


def test_blending_in_a_vector_moves_the_output_towards_it(llama: LlamaForCausalLM) -> None:
    target, alpha = torch.randn(2, 8), torch.tensor([0.25, 1.0], requires_grad=True)
    chosen = {"layers": 1, "heads": [0, 2]}
    with hw.attend(llama, readings=[hw.HeadOutput(what="vector", **chosen)]) as run:
        logits(llama)
    plain = run.tree["text"]["head_output"].values[:, 0]
    edit = hw.Blend(alpha, target=target, layer=1, heads=[0, 2], tokens="rest")
    with hw.attend(llama, readings=[hw.HeadOutput(what="vector", **chosen)], edits=[edit]) as run:
        llama(IDS).logits.sum().backward()
    mixed = run.tree["text"]["head_output"].values[:, 0]
    share = alpha.detach().numpy()[:, None, None]
    np.testing.assert_allclose(
        mixed[:, :, 1:], ((1 - share) * plain + share * target[:, None].numpy())[:, :, 1:], atol=1e-5
    )
    np.testing.assert_array_equal(mixed[:, :, 0], plain[:, :, 0])
    assert (alpha.grad != 0).all()
    with pytest.raises(hw.HeadwiseError, match=r"Blend\(alpha"), hw.attend(llama, edits=[hw.Blend(torch.ones(3))]):
        logits(llama)


def test_readings_of_one_kind_may_differ_in_size(llama: LlamaForCausalLM) -> None:
    x = torch.randn(20, 3)
    wanted = [hw.Top(1), hw.Top(4, name="four"), hw.Propagate(x=x), hw.Propagate(x=x[:, :2], name="two")]
    with hw.attend(llama, readings=wanted) as run:
        logits(llama)
    tree = run.tree["text"]
    assert tree["top_value"].dims[-1] == "rank"
    assert tree["four"].dims[-1] == "four_rank"
    np.testing.assert_array_equal(tree["four"][..., :1], tree["top_value"])
    np.testing.assert_allclose(tree["propagate"][..., :2], tree["two"], atol=1e-6)


def test_nested_blocks_compose(llama: LlamaForCausalLM) -> None:
    one, two = hw.HeadGain(layer=0, heads=[0], gain=0.0), hw.HeadGain(layer=2, heads=[1], gain=0.0)
    with hw.attend(llama, edits=[one, two]):
        both = logits(llama)
    with hw.attend(llama, edits=[one]) as outer, hw.attend(llama, readings=[hw.Entropy()], edits=[two]) as inner:
        nested = logits(llama)
    assert torch.allclose(both, nested, atol=1e-6)
    assert inner.tree["text"]["entropy"].shape == (2, 3, 4, 20)
    with pytest.raises(hw.HeadwiseError, match="no readings"):
        _ = outer.tree
    with pytest.raises(hw.HeadwiseError, match="part of a larger one"), hw.attend(llama), hw.attend(llama.model):
        pass
    segments = [hw.Segments(("a",), torch.zeros(20, dtype=torch.long)) for _ in range(2)]
    shared = pytest.raises(hw.HeadwiseError, match="share their segments")
    with shared, hw.attend(llama, segments=segments[0]), hw.attend(llama, segments=segments[1]):
        pass


def test_per_head_is_the_mean_of_per_query_over_a_corpus(llama: LlamaForCausalLM) -> None:
    readings = [hw.Mass(), hw.Entropy(), hw.Mass(per="head", name="m"), hw.Entropy(per="head", name="e")]
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    with torch.no_grad(), hw.attend(llama, readings=readings) as run:
        llama(IDS, attention_mask=mask)
        llama(IDS[:, :11])
    tree = run.tree["text"]
    values = tree["entropy"].values.transpose(1, 2, 0, 3).reshape(3, 4, -1)
    count = np.isfinite(values).sum(-1)
    assert (count == 20 + 14 + 2 * 11).all()
    np.testing.assert_allclose(tree["e"], np.nanmean(values, -1), rtol=1e-5)
    np.testing.assert_allclose(tree["e_count"], count)
    np.testing.assert_allclose(tree["e_sem"], np.nanstd(values, -1, ddof=1) / np.sqrt(count), rtol=1e-4)
    np.testing.assert_allclose(tree["m"].sum("segment"), 1.0, rtol=1e-5)
    assert tree["mass"].dims == ("sample", "layer", "head", "query", "segment")


def test_sampled_rows_are_exact(llama: LlamaForCausalLM) -> None:
    readings = [hw.Entropy(), hw.Entropy(queries=5, name="some"), hw.Top(queries=[3, -1], heads=[2], layers=[1])]
    with hw.attend(llama, readings=readings, seed=3) as run:
        logits(llama)
    tree = run.tree["text"]
    some = tree["some"].values
    there = np.isfinite(some)
    assert there[0, 0, 0].sum() == 5
    np.testing.assert_allclose(some[there], tree["entropy"].values[there], rtol=1e-5)
    assert tree["top_value"].dropna("query", how="all").coords["query"].values.tolist() == [3, 19]


def test_gradients_flow_through_an_edited_model(llama: LlamaForCausalLM) -> None:
    with hw.attend(llama, readings=[hw.Entropy()], edits=[hw.ScoreBias(0.5, keys="first")]):
        llama(IDS).logits.sum().backward()
    assert llama.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    llama.zero_grad()


def test_generation_is_one_sequence(llama: LlamaForCausalLM) -> None:
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = llama.generate(IDS, **options)
    segments = hw.Segments.from_spans({"start": (0, 5)}, length=20)
    with hw.attend(llama, readings=[hw.Mass(), hw.Top()], segments=segments) as run:
        assert torch.equal(llama.generate(IDS, **options), plain)
    tree = run.tree["text"]
    assert tree["mass"].shape == (2, 3, 4, 25, 3)
    assert tree["mass"].coords["segment"].values.tolist() == ["start", "rest", "generated"]
    with torch.no_grad(), hw.attend(llama, readings=[hw.Top()]) as whole:
        llama(plain[:, :25])
    np.testing.assert_array_equal(tree["top_index"], whole.tree["text"]["top_index"])


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no such layer": (lambda: hw.HeadGain(layer=9, gain=0.0), "layers are 0 to 2"),
    "no such head": (lambda: hw.HeadGain(layer=1, heads=[7], gain=0.0), "heads 0 to 3"),
    "no such stream": (lambda: hw.HeadGain(stream="vision", gain=0.0), "streams are text"),
    "not an edit": (lambda: hw.Entropy(), "takes edits such as"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_edit_is_refused_at_once(llama: LlamaForCausalLM, name: str) -> None:
    make, words = BAD[name]
    with pytest.raises(hw.HeadwiseError, match=words), hw.attend(llama, edits=[make()]):
        pass


def test_wrong_segments_are_refused(llama: LlamaForCausalLM) -> None:
    wrong = hw.Segments.from_spans({"a": (0, 3)}, length=7)
    with pytest.raises(hw.HeadwiseError, match=r"7.*20|20.*7"), hw.attend(llama, readings=[hw.Mass()], segments=wrong):
        logits(llama)
    with pytest.raises(hw.HeadwiseError, match="no segment 'image'"), hw.attend(llama, [hw.Mass(segments=("image",))]):
        logits(llama)


def test_models_that_cannot_be_entered_say_so() -> None:
    mamba = MambaModel(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=9, state_size=4))
    with pytest.raises(hw.HeadwiseError, match="no attention layers"), hw.attend(mamba, [hw.Entropy()]):
        pass
    with pytest.raises(hw.HeadwiseError, match=r"wants a torch.nn.Module"), hw.attend("gpt2", [hw.Entropy()]):  # type: ignore[arg-type]
        pass


def test_dropout_is_refused() -> None:
    bert = BertModel(BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).train()
    with pytest.raises(hw.HeadwiseError, match=r"model\.eval"), hw.attend(bert, [hw.Entropy()]):
        bert(IDS)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_with_masks_and_weights(batch_first: bool) -> None:
    torch.manual_seed(1)
    model = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    x = torch.randn(3, 5, 16)
    length = 5 if batch_first else 3
    padding = torch.zeros(x.numel() // 16 // length, length, dtype=torch.bool)
    padding[0, -1] = True
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    for options in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "need_weights": False},
        {"attn_mask": causal, "key_padding_mask": padding.float().masked_fill(padding, -math.inf)},
        {"average_attn_weights": False},
    ):
        with torch.no_grad():
            out, weights = model(x, x, x, **options)
            with hw.attend(model, readings=[hw.Map()]) as run:
                mine, same = model(x, x, x, **options)
        assert torch.allclose(out, mine, atol=1e-6)
        if weights is None:
            assert same is None
            continue
        assert torch.allclose(weights, same, atol=1e-6)
        rows = torch.tensor(next(iter(run.tree.children.values()))["map"].values[:, 0])
        assert torch.allclose(weights, rows if "average_attn_weights" in options else rows.mean(1), atol=1e-6)


class Mixed(nn.Module):
    """A model of transformers, entered by its registry, and one of PyTorch's own attention, by the function mode."""

    def __init__(self, text: nn.Module):
        super().__init__()
        self.text = text
        self.after = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.text(ids, output_hidden_states=True).hidden_states[-1]
        return h + self.after(h, h, h)[0]


def test_a_model_entered_in_both_ways_is_edited_once(llama: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    mixed = Mixed(llama).eval()
    edit = hw.HeadGain(layer=0, gain=0.5)
    with torch.no_grad():
        with hw.attend(llama, edits=[edit]):
            wanted = mixed(IDS)
        with hw.attend(mixed, edits=[edit]) as run:
            found = mixed(IDS)
        assert torch.allclose(found, wanted, atol=1e-6)
        assert (mixed(IDS) - wanted).abs().max() > 1e-4
    assert {row.how for row in run.report} == {"registry", "function-mode"}
