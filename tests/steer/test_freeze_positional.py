"""Heads frozen to tables of positions: heads that are positional already, slow references, generation, recipes."""

import math

import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.models import Opened, Segments, open_model
from headwise.steer.freeze_positional import by_offset
from tests.families.causal import EXPERTS, SMALL
from tests.families.family import Family, build
from tests.scan.models import bert, llama

DRAW = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 60, (n,), generator=DRAW) for n in (12, 9, 12)]
IDS = torch.randint(3, 60, (1, 15), generator=DRAW)
HEADS = ((1, 3), (0, 1))
MODES = ("offset", "place")


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


def positional(**changes: object) -> Opened:
    """A model whose queries and keys are the same for every token, before they are turned to their positions."""
    made = llama(attention_bias=True, **changes)
    for layer in made.model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.normal_(part.bias, std=1.5, generator=torch.Generator().manual_seed(7))
    made.model.double()
    return made


def logits(opened: Opened, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return opened.model(ids).logits


def maps(opened: Opened, *methods: steer.Method, ids: torch.Tensor = IDS) -> torch.Tensor:
    """[layer, head, query, key], in double precision."""
    edits = [edit for method in methods for edit in method.edits(opened)]
    with hw.attend(opened, [hw.Map()], edits) as run:
        logits(opened, ids)
    return torch.tensor(run.tree["text"]["map"].values[0]).double()


def frozen(offsets: torch.Tensor, size: int) -> torch.Tensor:
    """`softmax_j T[i - j]`, one number at a time; offsets past the table get nothing."""
    a = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(i + 1):
            a[i, j] = math.exp(offsets[i - j]) if i - j < len(offsets) else 0.0
    return a / a.sum(-1, keepdim=True)


@pytest.mark.parametrize("by", MODES)
def test_a_model_that_is_positional_is_left_as_it_is(by: str) -> None:
    opened = positional()
    method = steer.FreezeToPositional(by=by).calibrate(opened, TEXTS)
    torch.testing.assert_close(method.overlap(opened, TEXTS), torch.ones(8).double(), atol=1e-5, rtol=0)
    plain = logits(opened)[:, :12]  # past that no text was seen
    assert maps(opened)[0, :, 11].std() > 0.03
    with steer.apply(opened, method):
        torch.testing.assert_close(logits(opened)[:, :12], plain, atol=1e-4, rtol=1e-5)


def test_the_table_is_the_most_likely_one() -> None:
    """Against the estimate written out row by row, and against tables beside it."""
    rows = [torch.rand(n, n, generator=DRAW).double().tril() for n in (7, 5)]
    rows = [a / a.sum(-1, keepdim=True) for a in rows]
    total = [sum(float(a[i, i - d]) for a in rows for i in range(d, len(a))) for d in range(7)]
    sums = torch.tensor([total], dtype=torch.float64)
    found = by_offset(sums, torch.tensor([7, 5]))[0]
    w = torch.ones(7).double()
    for d in range(6, 0, -1):
        within = sum(float(a[i, i - e]) for a in rows for i in range(d, len(a)) for e in range(d + 1))
        share = float(sums[0, d]) / within
        w[d] *= share
        w[:d] *= 1 - share
    torch.testing.assert_close(found.exp(), w / w.max(), atol=1e-12, rtol=0)

    def likelihood(table: torch.Tensor) -> float:
        return sum(float((a * frozen(table, len(a)).clamp(min=1e-300).log()).sum()) for a in rows)

    for d in range(7):
        for step in (-0.05, 0.05):
            other = found.clone()
            other[d] += step
            assert likelihood(other) < likelihood(found) - 1e-4


def test_frozen_weights_are_those_of_the_table_and_no_others(opened: Opened) -> None:
    method = steer.FreezeToPositional(HEADS).calibrate(opened, TEXTS)
    plain, found = maps(opened), maps(opened, method)
    for n, (layer, head) in enumerate(HEADS):
        wanted = frozen(method.offsets[n], 15)
        assert wanted[14, 0] == wanted[14, 2] == 0  # farther back than any text
        torch.testing.assert_close(found[layer, head], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0, 0], plain[0, 0], atol=1e-7, rtol=0)
    other = maps(opened, method, ids=IDS.flip(1))
    torch.testing.assert_close(other[1, 3], found[1, 3], atol=1e-7, rtol=0)


def test_places_are_the_mean_of_the_texts_and_offsets_go_on_from_there(opened: Opened) -> None:
    by_offset = steer.FreezeToPositional(HEADS).calibrate(opened, TEXTS)
    method = steer.FreezeToPositional(HEADS, by="place").calibrate(opened, TEXTS)
    assert torch.equal(method.offsets, by_offset.offsets)
    seen, found = [maps(opened, ids=ids[None]) for ids in TEXTS], maps(opened, method)
    for n, (layer, head) in enumerate(HEADS):
        for i in range(15):
            rows = [a[layer, head, i] for a in seen if len(a[layer, head]) > i]
            wanted = frozen(by_offset.offsets[n], 15)[i]
            if rows:
                wanted = torch.zeros(15).double()
                wanted[: i + 1] = sum(row[: i + 1] for row in rows) / len(rows)
            torch.testing.assert_close(found[layer, head, i], wanted, atol=1e-5, rtol=0)


def test_every_path_gives_the_same(opened: Opened) -> None:
    from headwise.attention.engine import force_path

    for by in MODES:
        method, found = steer.FreezeToPositional(by=by).calibrate(opened, TEXTS), []
        for path in ("dense", "stream"):
            with force_path(path), steer.apply(opened, method):
                found.append(logits(opened))
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_overlap_is_what_both_have(opened: Opened) -> None:
    method = steer.FreezeToPositional(HEADS).calibrate(opened, TEXTS)
    for n, (layer, head) in enumerate(HEADS):
        rows = []
        for ids in TEXTS:
            a = maps(opened, ids=ids[None])[layer, head]
            rows += torch.minimum(a, frozen(method.offsets[n], len(ids))).sum(-1).tolist()
        assert float(method.overlap(opened, TEXTS)[n]) == pytest.approx(sum(rows) / len(rows), abs=1e-6)
        assert 0.2 < sum(rows) / len(rows) < 0.99


KINDS = {
    "soft cap and window": Family(
        "gemma2",
        SMALL | dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=0.7),
    ),
    "window": Family("mistral", SMALL | dict(sliding_window=5)),
}


@pytest.mark.parametrize("family", KINDS.values(), ids=KINDS)
def test_soft_caps_are_replaced_and_windows_stay(family: Family) -> None:
    small = open_model(build(family))
    method = steer.FreezeToPositional().calibrate(small, TEXTS)
    found, a = maps(small, method)[0, 2], frozen(method.offsets[2], 15)
    near = (torch.arange(15)[:, None] - torch.arange(15)) < 5
    torch.testing.assert_close(found, a * near / (a * near).sum(-1, keepdim=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("by", MODES)
def test_generating_with_and_without_a_cache(opened: Opened, by: str) -> None:
    method = steer.FreezeToPositional(by=by).calibrate(opened, TEXTS)
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    ids = torch.cat([IDS[:, :9], IDS.flip(1)[:, :9]])
    with steer.apply(opened, method):
        whole = opened.model.generate(ids, use_cache=False, **asked)
        for cache in (None, "static"):
            assert torch.equal(opened.model.generate(ids, cache_implementation=cache, **asked), whole)
    assert not torch.equal(opened.model.generate(ids, **asked), whole)


def test_a_padded_batch_writes_what_each_prompt_writes_alone(opened: Opened) -> None:
    method = steer.FreezeToPositional().calibrate(opened, TEXTS)
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    short, long = IDS[0, :6], IDS[0, 3:12]
    batch = torch.stack([torch.cat([torch.ones(3, dtype=torch.long), short]), long])
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    with steer.apply(opened, method):
        alone = [opened.model.generate(ids[None], **asked)[0, len(ids) :] for ids in (short, long)]
        found = opened.model.generate(batch, attention_mask=mask, **asked)[:, 9:]
    assert torch.equal(found, torch.stack(alone))
    by_place = steer.FreezeToPositional(by="place").calibrate(opened, TEXTS)
    with steer.apply(opened, by_place), pytest.raises(hw.HeadwiseError, match='padded on the left: use by="offset"'):
        opened.model.generate(batch, attention_mask=mask, **asked)
    opened.model.generate(batch, attention_mask=mask, **asked)  # the hook went with the method


@pytest.mark.parametrize("by", MODES)
def test_a_recipe_keeps_the_tables(opened: Opened, by: str, tmp_path) -> None:
    method = steer.FreezeToPositional(HEADS, by=by).calibrate(opened, TEXTS)
    path = steer.Recipe.of(opened, method).save(tmp_path / "frozen.json")
    again = steer.Recipe.load(path)
    again.check(opened)
    assert again.methods[0].heads == HEADS
    with steer.apply(opened, method):
        wanted = logits(opened)
    with steer.apply(opened, *again.methods):
        assert torch.equal(logits(opened), wanted)


def test_examples_are_texts(opened: Opened) -> None:
    examples = [steer.Example("the family was so much", " pleased"), steer.Example("the girls", " were there")]
    found = steer.calibrate(opened, steer.FreezeToPositional(HEADS), examples)
    wanted = steer.FreezeToPositional(HEADS).calibrate(opened, [e.prompt + e.answer for e in examples])
    assert torch.equal(found.offsets, wanted.offsets)


def test_it_stacks_with_a_bias_on_top(opened: Opened) -> None:
    method = steer.FreezeToPositional(HEADS).calibrate(opened, TEXTS)
    a = frozen(method.offsets[1], 15)
    a[:, 0] *= 3
    parts = Segments.positions(15)
    with steer.apply(opened, method, steer.TokenScale(gain=3.0), segments=parts):
        found = maps(opened)[0, 1]
    torch.testing.assert_close(found, a / a.sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_bad_input(opened: Opened) -> None:
    frozen_heads = steer.FreezeToPositional(HEADS)
    for texts in ("one text", [], [torch.ones(2, 3)], [torch.zeros(0, dtype=torch.long)], [5]):
        with pytest.raises(hw.HeadwiseError, match="texts: wanted"):
            frozen_heads.calibrate(opened, texts)
    with pytest.raises(hw.HeadwiseError, match="no tables yet"):
        frozen_heads.edits(opened)
    with pytest.raises(hw.HeadwiseError, match="no tables yet"):
        steer.FreezeToPositional(HEADS, by="place", offsets=torch.zeros(2, 5)).edits(opened)
    with pytest.raises(hw.HeadwiseError, match="tables for 3 heads, but 2 are"):
        steer.FreezeToPositional(HEADS, offsets=torch.zeros(3, 5)).edits(opened)
    with pytest.raises(hw.HeadwiseError, match=r"offsets=.*a tensor \[head, offset\], or None; got a tensor"):
        steer.FreezeToPositional(HEADS, offsets=torch.zeros(5))
    with pytest.raises(hw.HeadwiseError, match=r"offsets=.*finite numbers"):
        steer.FreezeToPositional(HEADS, offsets=torch.full((2, 5), math.nan))
    with pytest.raises(hw.HeadwiseError, match=r"places=.*\[2, 5, 5\]"):
        steer.FreezeToPositional(HEADS, "place", torch.zeros(2, 5), torch.zeros(2, 4, 4))
    with pytest.raises(hw.HeadwiseError, match=r"by=.*\"offset\" or \"place\""):
        steer.FreezeToPositional(by="lag")
    with pytest.raises(hw.HeadwiseError, match="sees later tokens"):
        steer.FreezeToPositional().calibrate(bert(), TEXTS)
    sinks = build(Family("gpt_oss", SMALL | EXPERTS | dict(sliding_window=5)))
    with pytest.raises(hw.HeadwiseError, match="has a sink beside them"):
        steer.FreezeToPositional().calibrate(open_model(sinks), TEXTS)
