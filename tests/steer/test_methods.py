"""Every method: nothing at its neutral setting, what its formula says elsewhere, and the model left as it was."""

import math

import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.models import Opened, Segments
from tests.scan.models import llama

IDS = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
SPANS = {"first": (0, 1), "span": (3, 6), "other": (7, 9), "last": (11, 12), "generated": (12, 12)}
PARTS = Segments.from_spans(SPANS, 12)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


def logits(opened: Opened) -> torch.Tensor:
    with torch.no_grad():
        return opened.model(IDS).logits


def weights(opened: Opened, *methods: steer.Method) -> torch.Tensor:
    """The whole map of layer 0, head 1, as a method leaves it: [query, key]."""
    edits = [edit for method in methods for edit in method.edits(opened)]
    reading = hw.Map(layers=0, heads=1)
    with hw.attend(opened, readings=[reading], edits=edits, segments=PARTS) as run:
        logits(opened)
    return torch.tensor(run.tree["text"]["map"].values[0, 0, 0]).double()


NEUTRAL = {
    "TokenScale": steer.TokenScale(gain=1.0),
    "ZeroTuning": steer.ZeroTuning(),
    "Emphasis": steer.Emphasis("span", alpha=1.0),
    "SplitSoftmax": steer.SplitSoftmax("span", tau=1.0),
    "FocusDirections": steer.FocusDirections(torch.ones(2, 4, 8), alpha=0.0),
    "FlattenBasin": steer.FlattenBasin(("span", "other"), (0.3, 0.1), strength=0.0),
    "AttentionBuckets": steer.AttentionBuckets((1.0,)),
    "ACT": steer.ACT(beta=1.0),
    "SoftInjection": steer.SoftInjection(torch.ones(2, 4, 8), torch.zeros(2, 4)),
    "ConceptHeads": steer.ConceptHeads(((0, 1),), alpha=1.0),
    "UniformMix": steer.UniformMix(lam=0.0),
    "ScaleHeads": steer.ScaleHeads(gain=1.0),
    "PositionalHiddenScaling": steer.PositionalHiddenScaling(5, factor=1.0),
}
ACTIVE = {
    "TokenScale": steer.TokenScale(gain=2.5),
    "ZeroTuning": steer.ZeroTuning(gain=0.5, heads=((0, 1), (1, 2))),
    "Emphasis": steer.Emphasis("span", alpha=0.1),
    "SplitSoftmax": steer.SplitSoftmax("span", tau=0.5),
    "FoundInTheMiddle": steer.FoundInTheMiddle(("span", "other"), relevance=(0.0, 1.0)),
    "FocusDirections": steer.FocusDirections(torch.ones(2, 4, 8), heads=((0, 1), (1, 0))),
    "FlattenBasin": steer.FlattenBasin(("span", "other"), (0.3, 0.1)),
    "AttentionBuckets": steer.AttentionBuckets(),
    "ACT": steer.ACT(sinks=((1, 2, (3, 4)),)),
    "SoftInjection": steer.SoftInjection(torch.ones(2, 4, 8), torch.full((2, 4), 0.5)),
    "ConceptHeads": steer.ConceptHeads(((0, 1),)),
    "ForceAttention": steer.ForceAttention((2, 5), queries="last"),
    "Knockout": steer.Knockout("span", queries="last"),
    "PatternMask": steer.PatternMask("previous", heads=((0, 1),)),
    "PositionalHiddenScaling": steer.PositionalHiddenScaling(5, layers=(0, 1)),
    "FreezeToPositional": steer.FreezeToPositional(((0, 1),), offsets=torch.zeros(1, 9)),
    "UniformMix": steer.UniformMix(lam=0.7),
    "ScaleHeads": steer.ScaleHeads(heads=((0, 1),), gain=-1.0),
}


def test_every_method_of_the_catalogue_is_tried_here() -> None:
    assert {kind.__name__ for kind in steer.METHODS} == set(ACTIVE)
    assert all(kind.what and kind.paper.title for kind in steer.METHODS)


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_setting_is_the_plain_model_bit_for_bit(opened: Opened, name: str) -> None:
    with steer.apply(opened, NEUTRAL[name], segments=PARTS):
        steered = logits(opened)
    assert torch.equal(steered, logits(opened))


@pytest.mark.parametrize("name", ACTIVE)
def test_a_method_takes_effect_and_is_undone(opened: Opened, name: str) -> None:
    before = logits(opened)
    with steer.apply(opened, ACTIVE[name], segments=PARTS):
        assert (logits(opened) - before).abs().max() > 1e-4
    assert torch.equal(before, logits(opened))


@pytest.mark.parametrize("gain", [0.3, 4.0])
def test_scaling_a_token_multiplies_and_renormalises(opened: Opened, gain: float) -> None:
    a = weights(opened)
    scaled = a.clone()
    scaled[:, 0] *= gain
    scaled /= scaled.sum(-1, keepdim=True)
    torch.testing.assert_close(weights(opened, steer.TokenScale(gain=gain)), scaled, atol=1e-6, rtol=0)


def test_gains_multiply(opened: Opened) -> None:
    both = weights(opened, steer.TokenScale(gain=2.0), steer.TokenScale(gain=1.5))
    torch.testing.assert_close(both, weights(opened, steer.TokenScale(gain=3.0)), atol=1e-6, rtol=0)


def test_a_gain_of_zero_leaves_the_first_query_its_only_key(opened: Opened) -> None:
    a = weights(opened, steer.TokenScale(gain=0.0))
    assert a[0, 0] == 1
    assert (a[1:, 0] == 0).all()
    torch.testing.assert_close(a.sum(-1), torch.ones(12).double(), atol=1e-6, rtol=0)


def test_emphasis_shrinks_everything_else(opened: Opened) -> None:
    a = weights(opened)
    share = torch.full((12,), 0.2).double()
    share[3:6] = 1
    wanted = a * share / (a * share).sum(-1, keepdim=True)
    torch.testing.assert_close(weights(opened, steer.Emphasis("span", alpha=0.2)), wanted, atol=1e-6, rtol=0)


def test_knockout_cuts_one_edge_only(opened: Opened) -> None:
    a, cut = weights(opened), weights(opened, steer.Knockout("span", queries="last"))
    assert (cut[11, 3:6] == 0).all()
    torch.testing.assert_close(cut[:11], a[:11], atol=1e-6, rtol=0)
    rest = a[11].clone()
    rest[3:6] = 0
    torch.testing.assert_close(cut[11], rest / rest.sum(), atol=1e-6, rtol=0)


def test_knockout_in_some_layers_leaves_the_others(opened: Opened) -> None:
    a = weights(opened)
    torch.testing.assert_close(weights(opened, steer.Knockout("span", layers=[1])), a, atol=1e-7, rtol=0)


@pytest.mark.parametrize("tau", [0.4, 2.0])
def test_split_softmax_raises_the_mass_to_a_power(opened: Opened, tau: float) -> None:
    a = weights(opened)
    p = a[:, 3:6].sum(-1, keepdim=True)
    wanted = a.clone()
    some = (p > 1e-5).squeeze(-1)  # queries before the span have nothing on it
    wanted[some] = a[some] * (1 - p[some] ** tau) / (1 - p[some])
    wanted[some, 3:6] = (a[:, 3:6] * p**tau / p)[some]
    found = weights(opened, steer.SplitSoftmax("span", tau=tau))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(12).double(), atol=1e-5, rtol=0)


def test_documents_get_the_shares_of_their_relevance_and_nothing_else_changes(opened: Opened) -> None:
    method = steer.FoundInTheMiddle(
        ("span", "other"), relevance=(0.2, 0.5), temperature=0.3, first_layer=0, queries=None
    )
    a, found = weights(opened), weights(opened, method)
    share = torch.tensor([0.2, 0.5]).double().div(0.3).softmax(-1)
    torch.testing.assert_close(method.shares, share, atol=1e-6, rtol=0)
    both = a[9:, 3:6].sum(-1) + a[9:, 7:9].sum(-1)
    torch.testing.assert_close(found[9:, 3:6].sum(-1), share[0] * both, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[9:, 7:9].sum(-1), share[1] * both, atol=1e-5, rtol=0)
    inside = a[9:, 3:6] / a[9:, 3:6].sum(-1, keepdim=True)
    torch.testing.assert_close(found[9:, 3:6], inside * found[9:, 3:6].sum(-1, keepdim=True), atol=1e-5, rtol=0)
    others = [0, 1, 2, 6, 9, 10, 11]
    torch.testing.assert_close(found[:, others], a[:, others], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:7], a[:7], atol=1e-6, rtol=0)  # queries that don't see both documents


def test_by_default_only_the_rows_that_write_the_answer_change(opened: Opened) -> None:
    method = steer.FoundInTheMiddle(("span", "other"), relevance=(0.2, 0.5), first_layer=0)
    a, found = weights(opened), weights(opened, method)
    torch.testing.assert_close(found[:11], a[:11], atol=1e-7, rtol=0)
    assert (found[11] - a[11]).abs().max() > 1e-3
    # Read at once, the tokens after the prompt are "generated": the same as all rows from the last one on.
    text = torch.cat([IDS, IDS[:, :4]], 1)
    known = PARTS.extend(16)
    tail = Segments.from_spans({"span": (3, 6), "other": (7, 9), "tail": (11, 16)}, 16)
    found = []
    for queries, segments in ((steer.found_in_the_middle.LAST_AND_GENERATED, known), ("tail", tail)):
        same = steer.FoundInTheMiddle(("span", "other"), relevance=(0.2, 0.5), first_layer=0, queries=queries)
        with steer.apply(opened, same, segments=segments), torch.no_grad():
            found.append(opened.model(text).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_generation_goes_on_as_it_was_steered(opened: Opened) -> None:
    method = steer.FoundInTheMiddle(("span", "other"), relevance=(0.0, 1.0), first_layer=0)
    asked = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with steer.apply(opened, method, segments=PARTS):
        cached = opened.model.generate(IDS, attention_mask=torch.ones_like(IDS), **asked)
    with steer.apply(opened, method, segments=PARTS.extend(17)), torch.no_grad():
        whole = opened.model(cached.sequences).logits[0, 11:-1]
    torch.testing.assert_close(torch.cat(cached.logits), whole, atol=1e-4, rtol=0)


def test_shares_that_are_the_models_own_change_nothing(opened: Opened) -> None:
    a = weights(opened)[11].double()
    own = torch.stack([a[3:6].sum(), a[7:9].sum()]).log()
    method = steer.FoundInTheMiddle(("span", "other"), tuple(own.tolist()), temperature=1.0, first_layer=0)
    torch.testing.assert_close(weights(opened, method)[11], a, atol=1e-6, rtol=0)


def test_shares_of_documents_in_the_limits() -> None:
    names = ("one", "two", "three")
    assert steer.FoundInTheMiddle(names, relevance=(1.0, 1.0, 1.0)).shares.tolist() == pytest.approx([1 / 3] * 3)
    hot = steer.FoundInTheMiddle(names, relevance=(0.1, 0.5, 0.2), temperature=1e9)
    assert hot.shares.tolist() == pytest.approx([1 / 3] * 3)
    cold = steer.FoundInTheMiddle(names, relevance=(0.1, 0.5, 0.2), temperature=1e-5)
    assert cold.shares.tolist() == pytest.approx([0, 1, 0])
    long = steer.FoundInTheMiddle(names, relevance=(1.0, 1.0, 1.0), lengths=(10, 20, 70))
    assert long.shares.tolist() == pytest.approx([0.1, 0.2, 0.7])


def test_a_relevance_for_every_head(opened: Opened) -> None:
    relevance = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(1))
    method = steer.FoundInTheMiddle(("span", "other"), relevance=relevance, first_layer=0)
    alone = steer.FoundInTheMiddle(("span", "other"), tuple(relevance[0, 1].tolist()), first_layer=0)
    torch.testing.assert_close(weights(opened, method), weights(opened, alone), atol=1e-6, rtol=0)  # layer 0, head 1


def test_relevance_is_attention_less_that_of_a_dummy_in_the_same_place() -> None:
    # For a random model the numbers mean nothing; that they are these differences does.
    opened = llama()
    docs = ["the family was pleased", "a man of large fortune", "the girls were there"]
    names = tuple(f"document {n + 1}" for n in range(3))
    empty = steer.FoundInTheMiddle(names)
    same = empty.calibrate(opened, "the house", docs, "who is pleased", dummy=docs[1])
    assert same.relevance[1] == pytest.approx(0.0, abs=1e-7)  # the document is its own dummy
    each = empty.calibrate(opened, "the house", docs, "who is pleased", dummy=docs[1], scope="head")
    assert each.relevance.mean((0, 1)).tolist() == pytest.approx(same.relevance, abs=1e-7)
    # The slow way for the first document: whole maps, last row, with the document and with the dummy.
    found = []
    for first in (docs[0], docs[1][: len("a man of large")]):
        batch, segments = Segments.from_documents(opened.tokenizer, [first, *docs[1:]], "the house", "who is pleased")
        with hw.attend(opened, readings=[hw.Map()]) as run, torch.no_grad():
            opened.model(**batch)
        rows = torch.tensor(run.tree["text"]["map"].values[0, :, :, -1]).mean((0, 1))
        found.append(float(rows[segments.mask(names[0])].mean()))
    assert same.relevance[0] == pytest.approx(found[0] - found[1], abs=1e-7)
    with pytest.raises(hw.HeadwiseError, match="call calibrate"):
        empty.edits(opened)
    with pytest.raises(hw.HeadwiseError, match="scope"):
        empty.calibrate(opened, "the house", docs, "who is pleased", scope="layer")


def test_the_best_item_stands_where_the_model_looks_most() -> None:
    profile, relevance = [0.3, 0.1, 0.2, 0.5], [0.0, 4.0, 2.0, 3.0]
    order = steer.attn_rank(profile, relevance)
    assert sorted(order) == [0, 1, 2, 3]
    assert [relevance[n] for n in order] == [3.0, 0.0, 2.0, 4.0]
    assert steer.rerank("abcd", profile, relevance) == ["d", "a", "c", "b"]
    assert steer.attn_rank([1.0] * 3, [2.0, 2.0, 5.0]) == [2, 0, 1]  # a flat profile keeps the order of relevance
    assert steer.attn_rank([0.1], [7.0]) == [0]
    with pytest.raises(hw.HeadwiseError, match="as many places"):
        steer.attn_rank([0.1], [1.0, 2.0])
    with pytest.raises(hw.HeadwiseError, match="relevance for each"):
        steer.rerank(["a"], [0.1, 0.2], [1.0, 2.0])


def test_a_flattened_basin_divides_by_the_profile(opened: Opened) -> None:
    a = weights(opened)
    gain = torch.ones(12).double()
    gain[3:6], gain[7:9] = (0.3 / 0.2) ** -0.5, (0.1 / 0.2) ** -0.5
    method = steer.FlattenBasin(("span", "other"), (0.3, 0.1), strength=0.5)
    torch.testing.assert_close(weights(opened, method), a * gain / (a * gain).sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_forced_attention_is_the_row_given(opened: Opened) -> None:
    a = weights(opened)
    method = steer.ForceAttention((2, 5), heads=((0, 1),), queries="last", weights=(1.0, 3.0))
    found = weights(opened, method)
    row = torch.zeros(12).double()
    row[2], row[5] = 0.25, 0.75
    torch.testing.assert_close(found[11], row, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:11], a[:11], atol=1e-7, rtol=0)
    own = steer.ForceAttention(tuple(range(12)), queries="last", weights=tuple(a[11].tolist()))
    torch.testing.assert_close(weights(opened, own)[11], a[11], atol=1e-5, rtol=0)


def test_methods_stack_in_the_order_given(opened: Opened) -> None:
    one, two = ACTIVE["TokenScale"], ACTIVE["ScaleHeads"]
    with steer.apply(opened, one, two):
        both = logits(opened)
    with steer.apply(opened, one), hw.attend(opened, edits=two.edits(opened)):
        assert torch.allclose(both, logits(opened), atol=1e-6)


@pytest.mark.parametrize("name", ACTIVE)
def test_every_pair_of_methods_stacks_and_is_undone(opened: Opened, name: str) -> None:
    """Stacked is nested: the outer first. ConceptHeads and ScaleHeads here turn the same head around twice."""
    before = logits(opened)
    for other in (one for one in ACTIVE if one != name):
        with steer.apply(opened, ACTIVE[name], ACTIVE[other], segments=PARTS):
            stacked = logits(opened)
        with steer.apply(opened, ACTIVE[name], segments=PARTS):
            alone = logits(opened)
            with steer.apply(opened, ACTIVE[other]):
                nested = logits(opened)
            assert torch.equal(logits(opened), alone)
        torch.testing.assert_close(nested, stacked, atol=1e-5, rtol=1e-4, msg=f"{name} and {other}")
        assert stacked.isfinite().all()
        assert torch.equal(logits(opened), before)
        assert {name, other} == {"ConceptHeads", "ScaleHeads"} or not torch.equal(stacked, before)


def test_the_order_of_methods_counts_within_a_kind_of_edit(opened: Opened) -> None:
    """Two re-weightings, each by what the one before it left, written out."""
    split = steer.SplitSoftmax("span", tau=0.5)
    share = steer.FoundInTheMiddle(("span", "other"), relevance=(0.0, 1.0), first_layer=0, queries=None)

    def splitted(a: torch.Tensor) -> torch.Tensor:
        p, out = a[3:6].sum(), a.clone()
        out[3:6] *= p**0.5 / p
        rest = [0, 1, 2, 6, 7, 8, 9, 10, 11]
        out[rest] *= (1 - p**0.5) / (1 - p)
        return out

    def shared(a: torch.Tensor) -> torch.Tensor:
        whole, out = a[3:6].sum() + a[7:9].sum(), a.clone()
        for place, part in zip((slice(3, 6), slice(7, 9)), share.shares, strict=True):
            out[place] *= part * whole / a[place].sum()
        return out

    a = weights(opened)[11]
    torch.testing.assert_close(weights(opened, split, share)[11], shared(splitted(a)), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights(opened, share, split)[11], splitted(shared(a)), atol=1e-5, rtol=0)
    assert (shared(splitted(a)) - splitted(shared(a))).abs().max() > 1e-3


def test_kinds_of_edits_apply_in_their_own_order_whatever_is_given_first(opened: Opened) -> None:
    """A bias counts before the softmax, and so before a re-weighting, a gain after both."""
    kinds = [ACTIVE[name] for name in ("FocusDirections", "TokenScale", "SplitSoftmax", "UniformMix", "ScaleHeads")]
    found = []
    for methods in (kinds, kinds[::-1]):
        with steer.apply(opened, *methods, segments=PARTS):
            found.append(logits(opened))
    assert torch.equal(*found)
    a = weights(opened)[11].clone()
    a[0] *= 2.5
    a /= a.sum()
    p = a[3:6].sum()
    inside = weights(opened, ACTIVE["SplitSoftmax"], ACTIVE["TokenScale"])[11, 3:6]
    torch.testing.assert_close(inside, a[3:6] * p**0.5 / p, atol=1e-5, rtol=0)


def test_a_pattern_of_another_model_is_refused(opened: Opened) -> None:
    other = hw.scan.heads(llama(num_hidden_layers=3), texts=["the family is here"], questions=["sinks"]).pattern(
        "sinks"
    )
    with (
        pytest.raises(hw.HeadwiseError, match="scan this model"),
        steer.apply(opened, steer.TokenScale(gain=2.0, heads=other)),
    ):
        pass


def test_a_pattern_of_this_model_gives_its_heads(opened: Opened) -> None:
    found = hw.scan.heads(opened, texts=["the family is here"], questions=["sinks"]).pattern("sinks")
    [edit] = steer.TokenScale(gain=2.0, heads=found).edits(opened)
    assert sorted(edit.heads) == [(layer, head) for layer in range(2) for head in range(4)]


@pytest.mark.parametrize(
    "wrong,said",
    [
        (lambda: steer.TokenScale(gain=-1.0), r"TokenScale\(gain"),
        (lambda: steer.TokenScale(gain=math.inf), r"TokenScale\(gain"),
        (lambda: steer.Emphasis("span", alpha=0.0), r"Emphasis\(alpha"),
        (lambda: steer.ScaleHeads(gain=math.nan), r"ScaleHeads\(gain"),
        (lambda: steer.Knockout("span", layers=[0], heads=[(0, 0)]), "layers= or heads="),
        (lambda: steer.SplitSoftmax("span", tau=0.0), r"SplitSoftmax\(tau"),
        (lambda: steer.FoundInTheMiddle(("one",)), r"FoundInTheMiddle\(documents"),
        (lambda: steer.FoundInTheMiddle(("one", "two"), relevance=(1.0,)), r"FoundInTheMiddle\(relevance"),
        (lambda: steer.FoundInTheMiddle(("one", "two"), temperature=0.0), r"FoundInTheMiddle\(temperature"),
        (lambda: steer.FoundInTheMiddle(("one", "two"), lengths=(3, 0)), r"FoundInTheMiddle\(lengths"),
        (lambda: steer.FocusDirections(key_directions=torch.ones(2, 4, 8)), r"FocusDirections\(keys"),
        (lambda: steer.ForceAttention(()), r"ForceAttention\(targets"),
        (lambda: steer.ForceAttention((1,), weights=(0.0,)), r"ForceAttention\(weights"),
        (lambda: steer.TokenScale(heads=(), gain=2.0).edits(llama()), "heads: wanted"),
        (lambda: steer.Choice("a", (" b",)), r"Choice\(options"),
        (lambda: steer.Choice("a", (" b", " c"), gold=2), r"Choice\(gold"),
    ],
)
def test_bad_settings_say_what_was_wanted(wrong, said: str) -> None:
    with pytest.raises(hw.HeadwiseError, match=said):
        wrong()


def test_an_unknown_segment_and_no_method_are_refused(opened: Opened) -> None:
    with (
        pytest.raises(hw.HeadwiseError, match="no segment 'nowhere'"),
        steer.apply(opened, steer.Emphasis("nowhere"), segments=PARTS),
    ):
        logits(opened)
    with pytest.raises(hw.HeadwiseError, match="at least one method"), steer.apply(opened):
        pass
    with pytest.raises(hw.HeadwiseError, match="wanted steering methods"), steer.apply(opened, hw.HeadGain()):
        pass
