"""Distance bias: the predicted curve against rotated vectors, the measured gap against the whole matrix."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.attention import Scores, attend
from headwise.attention.rope import Rotary, turn
from headwise.errors import HeadwiseError
from headwise.scan.distance_bias import DistanceBias, draw, expected, unturned
from headwise.scan.tokens import random_tokens
from tests.scan.models import bert, llama

SMALL = DistanceBias(near=(0, 8), far=(40, 48), queries=10, pairs=40)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_prediction_is_the_rotated_product_of_the_means(interleaved: bool) -> None:
    rotary = Rotary(torch.tensor([1.0, 0.3, 0.01]).double(), interleaved)
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 8).double()  # 8 channels: three pairs, and two channels that are not rotated
    lags = torch.tensor([0, 1, 5, 300])
    found = expected(q, k, lags, rotary)
    for n, lag in enumerate(lags.tolist()):
        at = torch.tensor([float(lag)]).double()
        turned = turn(q[None, :, None], at[:, None] * rotary.inv_freq, interleaved)[0, :, 0]
        torch.testing.assert_close(found[:, n], (turned * k).sum(-1))


def test_turning_back_undoes_the_rotation() -> None:
    rotary = Rotary(torch.tensor([1.0, 0.3]).double(), False)
    x, place = torch.randn(1, 2, 3, 5, 4).double(), torch.arange(5).double()
    turned = turn(x.flatten(0, 1), place[:, None] * rotary.inv_freq, False).view(x.shape)
    torch.testing.assert_close(unturned(turned, place, rotary), x)


def constant() -> tuple:
    """A model whose queries and keys are the same for every token, so that nothing but the distance makes a score."""
    opened = llama()
    for site in opened.sites:
        for name in ("q_proj", "k_proj"):
            part = getattr(site.module, name)
            torch.manual_seed(site.layer)
            part.weight.data.zero_()
            part.bias = torch.nn.Parameter(torch.randn(part.out_features))
    return opened, random_tokens(opened, 1, 96, seed=0)


def test_where_only_distance_counts_the_prediction_is_the_measurement() -> None:
    opened, ids = constant()
    result = scan.heads(opened, inputs=[{"input_ids": ids}], questions=[SMALL])
    measured, predicted = (result.data[f"distance_bias_{name}"].sel(stream="text") for name in ("curve", "predicted"))
    assert measured["lag"].values.tolist() == [1, 2, 4, 8, 16, 32]
    assert float(measured.std("lag").min()) > 0.01
    np.testing.assert_allclose(measured, predicted, atol=1e-4)


def test_without_rotation_there_is_no_bias() -> None:
    opened, ids = constant()
    opened.model.model.rotary_emb.inv_freq.zero_()
    found = scan.heads(opened, inputs=[{"input_ids": ids}], questions=[SMALL]).heads
    np.testing.assert_allclose(found["distance_bias"], 0, atol=1e-5)
    np.testing.assert_allclose(found["distance_bias_spread"], 0, atol=1e-3)


def test_the_gap_is_that_of_the_whole_matrix() -> None:
    opened = llama()
    opened.model.double()
    ids = random_tokens(opened, 1, 96, seed=0)
    found = scan.heads(opened, inputs=[{"input_ids": ids}], questions=[SMALL])
    with attend(opened, readings=[Scores(lags=tuple(range(96)))]) as run, torch.no_grad():
        opened.model(input_ids=ids)
    scores = run.tree["text"]["scores"].isel(sample=0).transpose("layer", "head", "query", "lag").values
    plan = draw(SMALL, 96)
    targets, queries = plan.readings[0].targets, plan.readings[0].queries
    assert len(queries) == 10
    assert plan.each == 4
    gaps = []
    for i in queries:
        lags = [i - j for j in targets[i].tolist()]
        assert all(0 <= near < 8 and 40 <= far < 48 for near, far in zip(lags[:4], lags[4:], strict=True))
        assert min(targets[i]) >= 1, "the first token is never compared"
        gaps.append(scores[:, :, i, lags[:4]] - scores[:, :, i, lags[4:]])
    gaps = np.stack(gaps, -2)
    np.testing.assert_allclose(found.heads["distance_bias"], gaps.mean((-1, -2)).ravel(), atol=1e-5)
    np.testing.assert_allclose(found.heads["distance_bias_spread"], gaps.std((-1, -2)).ravel(), atol=1e-5)
    sem = found.data["distance_bias_sem"].sel(stream="text").values
    np.testing.assert_allclose(sem, gaps.mean(-1).std(-1, ddof=1) / np.sqrt(10), rtol=1e-4)


def test_an_encoder_has_a_bias_and_no_prediction() -> None:
    opened = bert()
    result = scan.heads(opened, inputs=[{"input_ids": random_tokens(opened, 1, 96, 0)}], questions=[SMALL])
    assert result.heads["distance_bias"].notna().all()
    assert "distance_bias_curve" in result.data
    assert "distance_bias_predicted" not in result.data


def test_a_text_that_is_too_short_is_refused() -> None:
    opened = llama()
    with pytest.raises(HeadwiseError, match="at least 58 tokens for distances up to 47 and 10 queries; got 57"):
        scan.heads(opened, inputs=[{"input_ids": random_tokens(opened, 1, 57, 0)}], questions=[SMALL])


@pytest.mark.parametrize("options", [{"near": (5, 5)}, {"far": (-1, 4)}, {"queries": 1}, {"queries": 50, "pairs": 10}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(HeadwiseError, match=f"DistanceBias\\({next(iter(options))}"):
        DistanceBias(**options)
