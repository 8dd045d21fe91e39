"""The study of frozen heads on small random models: parts that overlap nowhere, tables of the heads named, verdicts."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama

from headwise import steer
from headwise.errors import HeadwiseError
from headwise.study import frozen_heads as studied


def test_the_halves_share_no_token() -> None:
    opened = llama()
    ids = opened.tokenizer(studied.haystack(), add_special_tokens=False)["input_ids"]
    first, second = studied.halves(opened, 3, 40)
    assert first.shape == second.shape == (3, 40)
    assert first[0].tolist() == ids[:40]
    assert second[-1].tolist() == ids[-40:]
    middle = len(ids) // 2
    assert first[-1].tolist() == ids[middle - 40 : middle]
    assert second[0].tolist() == ids[middle : middle + 40]
    with pytest.raises(HeadwiseError, match="length: half of the text"):
        studied.halves(opened, 3, 10**5)


def test_some_heads_keep_their_own_tables() -> None:
    opened = llama()
    learn, held = studied.halves(opened, 2, 24)
    every = studied.every_head(opened)
    whole = steer.FreezeToPositional().calibrate(opened, list(learn))
    part = studied.some(whole, every, np.array([6, 1]))
    assert part.heads == ((1, 2), (0, 1))
    alone = steer.FreezeToPositional(part.heads).calibrate(opened, list(learn))
    torch.testing.assert_close(part.offsets, alone.offsets, atol=1e-6, rtol=0)
    plain = studied.losses(opened, held)
    assert np.abs(studied.losses(opened, held, [part]) - plain).max() > 1e-4
    with torch.no_grad():
        whole_loss = torch.nn.functional.cross_entropy(opened.model(held[:1]).logits[0, :-1], held[0, 1:])
    assert plain[0] == pytest.approx(float(whole_loss), rel=1e-5)


@pytest.mark.parametrize(("cost", "verdict"), [(0.01, "holds"), (0.04, "holds"), (0.2, "fails"), (0.06, "fails")])
def test_the_verdict_follows_the_loss(monkeypatch, cost: float, verdict: str) -> None:
    opened, calls = llama(), []

    def losses(opened, windows, methods=()):
        calls.append(methods)
        best = {(layer, head) for layer, head in methods[0].heads} <= kept if methods else False
        return np.linspace(3, 3.1, len(windows)) + (0 if not methods else cost if best else 0.1)

    overlap = np.linspace(0.9, 0.1, 8)
    monkeypatch.setattr(steer.FreezeToPositional, "overlap", lambda *_: torch.tensor(overlap))
    monkeypatch.setattr(studied, "losses", losses)
    kept = {(0, 0)}  # the most positional of 8 is one head; random draws 0 and 1 begin with others
    found = studied.frozen_heads(opened, texts=3, length=16, shares=(0.1, 0.4))
    assert found.verdict == verdict
    assert found.measured["heads"] == [[0, 0]]
    assert found.measured["largest_cheap_share"] == (0.1 if verdict == "holds" else 0)
    assert len(calls) == 1 + len(found.measured["shares"]) * 3 + 2
    assert calls[-1] == [steer.ScaleHeads(heads=((0, 0),), gain=0.0)]


def test_it_runs_on_a_model() -> None:
    found = studied.frozen_heads(llama(), texts=2, length=24, draws=(0,))
    assert [row["heads"] for row in found.measured["shares"]] == [1, 1, 1, 2]
    assert 0 < found.measured["overlap"]["lowest"] < found.measured["overlap"]["highest"] < 1
