"""ACT against a plain loop, and how it finds its sinks."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise import steer
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


def test_bad_input(opened: Opened) -> None:
    for wrong in ({"beta": 1.5}, {"rule": "some"}, {"threshold": 0.0}, {"min_queries": 0}):
        with pytest.raises(hw.HeadwiseError, match=next(iter(wrong))):
            steer.ACT(**wrong)
    with pytest.raises(hw.HeadwiseError, match="one prompt"):
        steer.ACT().prepare(opened, {"input_ids": IDS.expand(2, -1)})
    with pytest.raises(hw.HeadwiseError, match="see the prompt first"):
        steer.ACT().edits(opened)
