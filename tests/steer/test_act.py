"""ACT against a plain loop, and how it finds its sinks."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.cli.generate import written
from headwise.models import Opened
from tests.scan.models import llama

IDS = torch.randint(3, 200, (1, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama(num_hidden_layers=4)


def weights(opened: Opened, layer: int, *methods: steer.Method) -> np.ndarray:
    """[head, query, key]"""
    edits = [edit for method in methods for edit in method.edits(opened)]
    with hw.attend(opened, readings=[hw.Map(layers=layer)], edits=edits) as run, torch.no_grad():
        opened.model(IDS)
    return run.tree["text"]["map"].values[0, 0].astype(float)


def reference(a: np.ndarray, sinks: list[int], beta: float) -> np.ndarray:
    """The card's formula, row by row."""
    new = a.copy()
    for row in new:
        s = sum(row[k] for k in sinks)
        if 1 - s < 1e-6:
            continue
        for k in range(len(row)):
            row[k] *= beta if k in sinks else 1 + (1 - beta) * s / (1 - s)
    return new


@pytest.mark.parametrize("rule,limit", [("absolute", 0.09), ("relative", 1.5 / 16)])
def test_sinks_are_the_keys_of_high_mean_weight_behind_the_first(opened: Opened, rule: str, limit: float) -> None:
    act = steer.ACT(rule=rule, threshold=0.09, alpha=1.5, min_queries=4).prepare(opened, {"input_ids": IDS})
    found = {(layer, head): set(keys) for layer, head, keys in act.sinks}
    assert {layer for layer, _ in found} == {2}  # the first two layers and the last are left alone
    a = weights(opened, 2)
    for head in range(4):
        mean = [a[head, k:, k].mean() for k in range(16)]
        assert found.get((2, head), set()) == {k for k in range(1, 13) if mean[k] > limit}


def test_the_released_codes_way_spares_each_heads_first_sink(opened: Opened) -> None:
    spared = []
    for limit in (0.04, 0.25):
        act = steer.ACT(spared="sink", threshold=limit, min_queries=1, heads=[(2, h) for h in range(4)])
        found = {head: set(keys) for _, head, keys in act.prepare(opened, {"input_ids": IDS}).sinks}
        for head, a in enumerate(weights(opened, 2)):
            above = [k for k in range(16) if a[k:, k].mean() > limit]
            assert found.get(head, set()) == set(above[1:])
            spared += above[:1]
    assert 0 in spared
    assert any(k > 0 for k in spared), "a first token below the threshold is not what is spared"


@pytest.mark.parametrize("rule", ["absolute", "relative"])
def test_padding_on_the_left_moves_the_sinks_along(opened: Opened, rule: str) -> None:
    act = steer.ACT(threshold=0.09, min_queries=4, rule=rule, alpha=1.5)
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(19) >= 3).long()[None]
    moved = act.prepare(opened, {"input_ids": padded, "attention_mask": mask})
    plain = act.prepare(opened, {"input_ids": IDS})
    assert moved.sinks == tuple((layer, h, tuple(k + 3 for k in keys)) for layer, h, keys in plain.sinks)


def test_rows_are_what_the_loop_gives() -> None:
    opened = llama(num_hidden_layers=4)
    opened.model.double()  # where a row sees little but sinks, float32 knows the rest to a few digits only
    act = steer.ACT(beta=0.3, threshold=0.09, min_queries=4).prepare(opened, {"input_ids": IDS})
    a, calibrated = weights(opened, 2), weights(opened, 2, act)
    for _, head, keys in act.sinks:
        np.testing.assert_allclose(calibrated[head], reference(a[head], list(keys), 0.3), atol=1e-9)
        np.testing.assert_allclose(calibrated[head].sum(-1), 1, atol=1e-9)


def test_without_sinks_the_model_is_bit_equal(opened: Opened) -> None:
    act = steer.ACT(threshold=1.0).prepare(opened, {"input_ids": IDS})
    assert act.sinks == ()
    with torch.no_grad():
        plain = opened.model(IDS).logits
        with steer.apply(opened, act):
            assert torch.equal(opened.model(IDS).logits, plain)


def test_sinks_found_in_the_prompt_stay_while_it_goes_on(opened: Opened) -> None:
    act = steer.ACT(threshold=0.09, min_queries=4).prepare(opened, {"input_ids": IDS})
    with steer.apply(opened, act):
        found = opened.model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
        ids = IDS
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, opened.model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_the_command_line_shows_it_the_prompt_first(opened: Opened) -> None:
    act = steer.ACT(threshold=0.05, min_queries=2)
    prompt = "the family was so much pleased with the house and the large garden of the man"
    batch = opened.encode(prompt)
    with steer.apply(opened, act.prepare(opened, batch)):
        ids = opened.model.generate(**batch, max_new_tokens=4, do_sample=False)
    wanted = opened.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert written(opened, prompt, (), 4, [act]).strip() == wanted
    assert steer.TokenScale().prepare(opened, batch) == steer.TokenScale()


def test_calibration_keeps_heads_that_help(opened: Opened) -> None:
    act = steer.ACT(threshold=0.05, min_queries=1, beta=0.0)
    text = "the family was so much pleased with the house and the large garden of the man"
    options = (" him", " her", " a", " the")
    kept = []
    for gold in range(len(options)):
        examples = [steer.Choice(text, options, gold=gold)]
        plain = steer.accuracy(opened, examples)
        helps = [
            p
            for p in act.chosen(opened)
            if steer.ACT(**{**vars(act), "heads": (p,)}).right(opened, examples[0]) > plain
        ]
        if helps:
            kept.append(gold)
            assert list(act.calibrate(opened, examples).heads) == helps
        else:
            with pytest.raises(hw.HeadwiseError, match="no head raises"):
                act.calibrate(opened, examples)
    assert len(kept) < len(options)  # the model's own answer can't be made better


def test_slopes_are_those_of_the_strength() -> None:
    opened = llama(num_hidden_layers=5)
    opened.model.double()
    act = steer.ACT(threshold=0.02, min_queries=1)
    text = "the family was so much pleased with the house and the large garden of the man"
    examples = [steer.Choice(text, (" him", " her"), gold=1), steer.Choice(text[:40], (" a", " the"), gold=0)]
    slopes = act.slopes(opened, examples)
    assert slopes[[0, 1, 4]].eq(0).all(), "layers that are left alone"
    for layer, head in ((2, 1), (3, 0)):
        total = 0.0
        for example in examples:
            sinks = act.prepare(opened, opened.encode(example.prompt)).sinks
            for step, factor in ((0, -3), (1e-3, 4), (2e-3, -1)):  # a strength below 0 has no weights
                strength = torch.zeros(5, 4)
                strength[layer, head] = step
                with hw.attend(opened, edits=act.reweights(sinks, strength)):
                    p = steer.option_logprobs(opened, example).log_softmax(-1)
                total += factor * float(p[example.gold]) / 2e-3 / len(examples)
        assert float(slopes[layer, head]) == pytest.approx(total, rel=0.02, abs=1e-5)
    kept = act.calibrate(opened, examples, by="gradient").heads
    assert set(kept) == {(a, h) for a in (2, 3) for h in range(4) if slopes[a, h] > 0}


def test_bad_input(opened: Opened) -> None:
    for wrong in ({"beta": 1.5}, {"rule": "some"}, {"threshold": 0.0}, {"min_queries": 0}, {"spared": "all"}):
        with pytest.raises(hw.HeadwiseError, match=next(iter(wrong))):
            steer.ACT(**wrong)
    with pytest.raises(hw.HeadwiseError, match="one prompt"):
        steer.ACT().prepare(opened, {"input_ids": IDS.expand(2, -1)})
    with pytest.raises(hw.HeadwiseError, match="by: wanted"):
        steer.ACT().calibrate(opened, [steer.Choice("a", ("b", "c"), gold=0)], by="luck")
    with pytest.raises(hw.HeadwiseError, match="gold is known"):
        steer.ACT().slopes(opened, [steer.Choice("a", ("b", "c"))])
    with pytest.raises(hw.HeadwiseError, match="see the prompt first"):
        steer.ACT().edits(opened)
