"""The long-context studies on a small random model; and an edit that decides nothing changes nothing."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama
from torch.nn import functional as F

from headwise.attention import Map, attend
from headwise.attention.engine import DENSE_PLACES
from headwise.scan.long_context import LongContextHeads
from headwise.study.long_context import localise, long_context_perplexity, long_context_prediction, look, passages

SMALL = LongContextHeads(tau=0.5, sink=4, local=8, queries=16)


@pytest.fixture(scope="module")
def text():
    opened = llama()
    return opened, look(opened, passages(opened, 2, 80)[0], SMALL)


def test_no_local_decision_is_the_plain_model_and_all_local_ignores_the_far_keys(text) -> None:
    opened, found = text
    every = np.ones(found.far.shape, bool)
    with torch.no_grad():
        logits = opened.model(input_ids=found.ids[None]).logits
    plain = F.cross_entropy(logits[0, 64:-1], found.ids[65:]).item()
    assert found.loss(every) == pytest.approx(plain, abs=1e-5)
    assert found.loss(every) == pytest.approx(plain, abs=1e-5), "the cache is as it was"
    assert abs(found.loss(~every) - plain) > 1e-3


def test_the_far_share_is_that_of_the_whole_matrix(text) -> None:
    opened, found = text
    with attend(opened, readings=[Map(queries=tuple(range(64, 80)))]) as run, torch.no_grad():
        opened.model(input_ids=found.ids[None])
    weights = run.tree["text"]["map"].isel(sample=0).transpose("layer", "head", "query", "key").values
    far, _ = SMALL.spans(80)
    np.testing.assert_allclose(found.far, weights[..., far.start : far.stop].sum(-1), atol=1e-5)


def test_local_weights_keep_the_sum() -> None:
    masses = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]]]])
    weights = localise(torch.tensor([[True, False]]), masses)
    torch.testing.assert_close(weights, torch.tensor([[[[1.0, 1.0], [2.0, 0.0]]]]))
    torch.testing.assert_close((weights * masses).sum(-1), torch.ones(1, 1, 2))


def test_static_labels_are_ranks_of_whole_heads(text) -> None:
    _, found = text
    rank = found.rank(found.far.shape)
    assert (rank == rank[..., :1]).all()
    assert sorted(rank[..., 0].ravel()) == [n / 8 for n in range(8)]
    assert rank[..., 0].argmax() == found.far.mean(-1).argmax()


def test_the_studies_measure_every_criterion() -> None:
    opened = llama()
    found = long_context_prediction(opened, SMALL, length=80)
    assert {"own", "other_text", "random_words", "static"} <= set(found.measured["accuracy"])
    assert sum(found.measured["heads"].values()) == pytest.approx(1)
    found = long_context_perplexity(opened, SMALL, length=80, levels=(0.0, 0.5))
    assert set(found.measured["rise"]) == {"oracle", "gaussian", "static", "random"}
    for rises in found.measured["rise"].values():
        assert abs(rises["0.0"]) < abs(found.measured["rise_all_local"]), "only the smallest decision is local"


def test_decisions_reach_their_queries_where_others_walk_in_blocks() -> None:
    opened = llama()
    wide = LongContextHeads(sink=4, local=8, queries=100)
    ids = passages(opened, 1, 220)[0]
    assert DENSE_PLACES < 100 * 220, "large enough for blocks of queries"
    found = look(opened, ids, wide)
    every = np.ones(found.far.shape, bool)
    with torch.no_grad():
        logits = opened.model(input_ids=ids[None]).logits
    assert found.loss(every) == pytest.approx(F.cross_entropy(logits[0, 120:-1], ids[121:]).item(), abs=1e-5)
