"""The study of Attention Buckets on a tiny model."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama

from headwise import steer
from headwise.study.attention_buckets import answered, attention_buckets, branches, compared, settings
from headwise.study.tasks import key_values


def test_it_runs_and_says_why() -> None:
    found = attention_buckets(llama(), items=4, copies=2, repeats=(1, 2), length=64)
    rows = {row["setting"]: row for row in found.measured["settings"]}
    assert rows["plain"]["mean_change"] == [0, 0, 0]
    assert (
        rows["buckets"]["worst_change"][1] <= rows["buckets"]["worst_change"][0] <= rows["buckets"]["worst_change"][2]
    )
    assert found.measured["ratios"][0] == 1
    assert not set(found.measured["ratios"][1:]) & set(found.measured["random_ratios"])
    assert found.measured["examples"] == 8
    assert found.verdict in ("holds", "fails")


def test_one_batch_gives_what_apply_gives() -> None:
    opened = llama()
    ways, every = settings((1.0, 2.0, 3.0), (1.0, 1.5, 2.5))
    [example] = key_values(0, 1, 4)
    found = answered(opened, example, ways, every)
    ids = opened.encode(example.prompt + example.options[example.gold])["input_ids"]
    start = opened.encode(example.prompt)["input_ids"].shape[1]
    for row, name in enumerate(ways):
        if name == "equal weights":
            logits = branches(opened, ids, (1.0, 2.0, 3.0), slice(None)).mean(0)[None]
        else:
            with steer.apply(opened, ways[name]), torch.no_grad():
                logits = opened.model(ids).logits
        p = logits[0, start - 1 : -1].log_softmax(-1).gather(-1, ids[0, start:, None]).sum()
        assert found[row, 0] == pytest.approx(float(p), abs=1e-3)


def test_the_worst_place_is_compared_with_the_worst_place() -> None:
    place = np.array([0, 1, 0, 1])
    held = np.zeros((4, 2, 2))
    held[:, 0, 0] = [-1, -5, -1, -5]
    held[:, 1, 0] = [-3, -2, -3, -2]
    row = compared("other", held, ["plain", "other"], place, seed=0, draws=10)
    assert row["mean_change"] == [0.5, 0.5, 0.5]
    assert row["worst_change"] == [2, 2, 2]
