"""Decoding one token at a time: the quick way gives what the general way gives, edit by edit and in whole models."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise as hw
from headwise.attention import force_path
from headwise.attention.call import AttentionCall, Labels
from headwise.attention.dense import dense
from headwise.attention.effects import finish, resolve
from headwise.attention.engine import uniform
from headwise.attention.incoming import Seen
from headwise.attention.label_table import LabelTable
from headwise.attention.mask import Mask
from headwise.attention.scratch import Scratch
from headwise.models.segments import Segments

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("start", "middle", "end")
ALL = [0, 1, 2, 3]
EDITS = {
    "none": [],
    "biases": [
        (hw.ScoreBias(keys="end", value=0.7), [0, 2]),
        (hw.ScoreBias(keys="start", value=-math.inf, queries="generated"), [1]),
        (hw.ScoreBias(keys="middle", value=2.0, queries="start"), ALL),
        (hw.ScoreBias(value=-0.5), [3]),
    ],
    "reweight": [(hw.Reweight(rule=lambda m: 1.2 - m, groups=("start", "end")), [0, 1, 3])],
    "other queries": [(hw.Reweight(rule=lambda m: 1.2 - m, groups=("middle",), queries="end"), ALL)],
    "gains": [(hw.HeadGain(gain=0.5), [1, 2]), (hw.HeadGain(gain=3.0, tokens="generated"), [2, 3])],
}
EDITS["all"] = EDITS["biases"] + EDITS["reweight"] + EDITS["gains"]
CALLS = {
    "plain": {},
    "window": {"left": 30, "j0": 24},
    "padding": {"padding": True, "right": None},
    "sinks, softcap": {"sinks": True, "softcap": 3.0},
    "odd dims, room in the cache": {"dim": 24, "value_dim": 40, "later": 9},
}
PAIRS = [("plain", e) for e in EDITS] + [(c, "all") for c in CALLS if c != "plain"]


def make(keys=150, left=None, right=0, j0=0, padding=False, sinks=False, softcap=None, dim=16, value_dim=16, later=0):
    """A query at the end of the keys, of which `later` are after it."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    mask = Mask(left=left, right=right, batch=2)
    if padding:
        mask.key_valid = (torch.arange(keys)[None] >= torch.tensor([[0], [100]])).to(DEVICE)
    known = LabelTable(Segments(NAMES, torch.arange(j0 + keys - 4) * 3 // (j0 + keys - 4)), DEVICE)
    i, table = torch.tensor([j0 + keys - 1 - later], device=DEVICE), known.table(j0 + keys, 2)
    call = AttentionCall(
        random(2, 4, 1, dim), random(2, 2, keys, dim), random(2, 2, keys, value_dim), 0.25, mask, i=i, j0=j0,
        softcap=softcap, sinks=random(4) if sinks else None,
        labels=Labels(known.all_names, table[:, j0 : j0 + keys], table[:, i]),
        site=SimpleNamespace(kind="self", name="layer"),
    )  # fmt: skip
    return call, known


@pytest.mark.parametrize("kind, edit", PAIRS)
def test_a_step_equals_dense(kind, edit):
    from headwise.attention.fused_step import fused_step

    call, known = make(**CALLS[kind])
    scratch = Scratch()
    step = fused_step(call, EDITS[edit], known, scratch)
    mask = call.mask
    valid = None if mask.key_valid is None else mask.key_valid.view(torch.uint8)
    found = step.run(call.q, call.k, call.v, Seen(call.first - call.j0, call.j0, mask.left, mask.right, valid))
    effects = resolve(call, EDITS[edit])
    wanted = finish(effects, dense(effects, [], torch.float64)[0], uniform)
    torch.testing.assert_close(found.transpose(1, 2).double(), wanted, atol=2e-6, rtol=1e-5)
    assert not scratch.flagged()


@pytest.mark.parametrize("edit", [
    hw.ScoreMap(torch.tanh), hw.ScoreBias(0.1, keys=torch.ones(9)), hw.ScoreBias(1.0, keys="previous"),
    hw.HeadGain(gain="mean"), hw.Blend(0.5), hw.Shift(q=torch.ones(16)), hw.Reweight(groups=("window:3",)),
])  # fmt: skip
def test_what_is_no_table_goes_the_general_way(edit):
    from headwise.attention.fused_step import fused_step

    call, known = make(keys=20)
    assert fused_step(call, [(edit, ALL)], known, Scratch()) is None


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa", initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(DEVICE)


IDS = torch.randint(0, 99, (2, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
SEGMENTS = hw.Segments(("a", "b", "generated"), torch.arange(8) // 4)
STEERED = [
    hw.ScoreBias(keys="a", value=1.5, heads=[0, 1]),
    hw.Reweight(rule=lambda m: 1.5 - m, groups=("a", "b"), heads=[1, 2], layer=1),
    hw.HeadGain(gain=0.2, heads=[3], tokens="generated"),
]


@torch.no_grad()
def decoded(model, path, edits, steps=3, mask=None):
    """Logits of the tokens after a prompt, and the open run."""
    found = []
    with hw.attend(model, edits=edits, segments=SEGMENTS) as run, force_path(path):
        with force_path("dense"):
            out = model(IDS, use_cache=True, attention_mask=mask)
        token = torch.full((2, 1), 7, device=DEVICE)
        for _ in range(steps):
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True, attention_mask=mask)
            token = out.logits[:, -1:].argmax(-1)
            found.append(out.logits)
        steps = dict(run.session.steps)
    return torch.cat(found, 1), run, steps


@pytest.mark.parametrize("padded", [False, True])
def test_decoding_with_edits_is_the_same_step_by_step(llama, padded):
    mask = torch.ones(2, 8, dtype=torch.long, device=DEVICE)
    mask[1, :3] = 0
    mask = mask if padded else None
    wanted, _, none = decoded(llama, "dense", STEERED, mask=mask)
    found, run, steps = decoded(llama, "fused", STEERED, mask=mask)
    assert not none
    assert len(steps) == 2
    assert all(row.status == "reached" and row.path == "fused" for row in run.report)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - decoded(llama, "dense", [], mask=mask)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_sites_without_edits_are_left_to_pytorch(llama):
    cache = llama(IDS, use_cache=True).past_key_values
    plain = [llama(IDS[:, n : n + 1], past_key_values=cache).logits for n in range(3)]
    with hw.attend(llama, edits=[hw.ScoreMap(torch.tanh, layer=1)]) as run:
        cache = llama(IDS, use_cache=True).past_key_values
        edited = [llama(IDS[:, n : n + 1], past_key_values=cache).logits for n in range(3)]
        assert [step.path for step in run.session.steps.values()] == ["library"]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(plain, edited))
    with hw.attend(llama) as run:
        cache = llama(IDS, use_cache=True).past_key_values
        watched = [llama(IDS[:, n : n + 1], past_key_values=cache).logits for n in range(3)]
        assert len(run.session.steps) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, watched))


def test_a_step_is_dropped_when_what_is_wanted_changes(llama):
    with torch.no_grad(), hw.attend(llama) as run:
        cache = llama(IDS, use_cache=True).past_key_values
        llama(IDS[:, :1], past_key_values=cache)
        assert len(run.session.steps) == 2
        assert len(set(map(id, run.session.steps.values()))) == 1, "layers that are alike share a step"
        with hw.attend(llama, readings=[hw.Entropy()]) as inner:
            assert not run.session.steps
            llama(IDS[:, :1], past_key_values=cache)
        assert inner.tree["text"]["entropy"].shape[-1] == 1


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_a_rule_that_gives_nonsense_is_told_of_at_the_end(llama, bad):
    rules = iter([1.0, 1.0, bad])  # for the prompt, the first token and the second
    edit = hw.Reweight(rule=lambda m: torch.full_like(m, next(rules)), groups=("a",), layer=0)
    with pytest.raises(hw.HeadwiseError, match="negative or not finite"):
        decoded(llama, "fused", [edit], steps=2)


def test_labels_that_must_grow_with_every_token(llama, monkeypatch):
    wanted = decoded(llama, "dense", STEERED)[0]
    monkeypatch.setattr("headwise.attention.label_table.SPARE", 0)
    torch.testing.assert_close(decoded(llama, "fused", STEERED)[0], wanted, atol=1e-4, rtol=1e-4)


def test_launches_after_the_first_give_addresses():
    from headwise.attention.fused_step import Launch

    calls = []
    compiled = SimpleNamespace(function=7, packed_metadata=8, run=lambda *a: calls.append(a))
    kernel = {(1, 2, 3): lambda *a, **k: calls.append((a, k)) or compiled}
    launch = Launch(kernel, {"num_warps": 4}, D=16)
    changing, fixed, later = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    launch.bind(fixed, 0.5)
    launch((1, 2, 3), 9, (changing,), (5,))
    assert calls.pop() == ((changing, 5, fixed, 0.5), {"D": 16, "num_warps": 4})
    launch.bind(later, 0.5)
    launch((1, 2, 3), 9, (changing,), (5,))
    assert calls == [(1, 2, 3, 9, 7, 8, None, None, None, changing.data_ptr(), 5, later.data_ptr(), 0.5, 16)]
