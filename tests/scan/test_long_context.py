"""Key moments against drawn keys and against the whole matrix of a small model; what makes a head local or long."""

import numpy as np
import pytest
import torch
import xarray as xr

from headwise import scan
from headwise.attention import Map, Scores, attend
from headwise.errors import HeadwiseError
from headwise.scan.key_moments import KeyMoments, scale
from headwise.scan.long_context import LongContextHeads, kind
from headwise.scan.tokens import random_tokens
from tests.scan.models import bert, llama

SMALL = {"sink": 4, "local": 8, "queries": 6}


def drawn(spread: float, count: int, dim: int = 8) -> tuple[KeyMoments, xr.DataArray, np.ndarray]:
    """Moments of keys drawn from a normal distribution, a query, and the keys' scores."""
    draw = np.random.default_rng(0)
    middle, mix = draw.normal(size=dim), spread * draw.normal(size=(dim, dim)) / dim
    keys = middle + draw.normal(size=(count, dim)) @ mix
    q = draw.normal(size=dim)
    place = ("layer", "head")
    moments = KeyMoments(
        xr.DataArray(keys.mean(0)[None, None], dims=(*place, "channel")),
        xr.DataArray(np.cov(keys.T, bias=True)[None, None], dims=(*place, "channel", "channel2")),
        xr.DataArray([[0.5]], dims=place),
    )
    return moments, xr.DataArray(q[None, None, None, None], dims=("sample", *place, "query", "channel")), 0.5 * keys @ q


def test_the_estimate_is_exact_for_equal_keys() -> None:
    moments, q, scores = drawn(spread=0.0, count=50)
    assert moments.log_mass(q, 50).item() == pytest.approx(np.log(np.exp(scores).sum()), abs=1e-10)
    assert moments.log_mass(q, 50).item() == pytest.approx(np.log(50) + scores[0], abs=1e-10)


def test_the_estimate_tends_to_the_truth_for_normal_keys() -> None:
    off = []
    for count in (100, 100_000):
        moments, q, scores = drawn(spread=1.0, count=count)
        assert scores.std() > 0.2, "the spread must matter"
        off.append(abs(moments.log_mass(q, count).item() - np.log(np.exp(scores).sum())))
    assert off[1] < 0.005
    assert off[1] < off[0]


def whole(opened, ids) -> xr.Dataset:
    with attend(opened, readings=[Map(), Scores(lags=tuple(range(ids.shape[1])))]) as run, torch.no_grad():
        opened.model(input_ids=ids)
    return run.tree["text"].to_dataset()


def test_scores_equal_those_of_the_whole_matrix() -> None:
    opened = llama()
    opened.model.double()
    ids = random_tokens(opened, 1, 60, seed=0)
    question = LongContextHeads(tau=0.5, **SMALL)
    far, queries = question.spans(60)
    assert (far, queries) == (range(4, 47), range(54, 60))
    found = scan.heads(opened, inputs=[{"input_ids": ids}], questions=[question]).heads
    seen = whole(opened, ids)
    weights = seen["map"].isel(sample=0, query=list(queries)).transpose("layer", "head", "query", "key").values
    mass = weights[..., far.start : far.stop].sum(-1)
    np.testing.assert_allclose(found["long_context_heads"], (mass > 0.5).mean(-1).ravel(), atol=1e-6)
    assert 0 < found["long_context_heads"].mean() < 1
    scores = seen["scores"].isel(sample=0).transpose("layer", "head", "query", "lag").values
    true = np.array(
        [[np.log(np.exp([s[i, i - j] for j in far]).sum()) for i in queries] for s in scores.reshape(-1, 60, 60)]
    )
    near = np.array(
        [
            [np.log(np.exp([s[i, i - j] for j in range(i + 1) if j not in far]).sum()) for i in queries]
            for s in scores.reshape(-1, 60, 60)
        ]
    )
    moments = KeyMoments.fit(opened, {"input_ids": ids}, list(far))
    q = queries_of(opened, ids, queries)
    estimate = moments.log_mass(q, len(far)).isel(sample=0).values.reshape(-1, len(queries))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(estimate, true, strict=True)]
    np.testing.assert_allclose(found["long_context_correlation"], expected, atol=1e-5)
    said = estimate - near > 0  # tau = 0.5: the far part is the larger one
    np.testing.assert_allclose(found["long_context_predicted"], said.mean(-1), atol=1e-6)
    np.testing.assert_allclose(found["long_context_agreement"], (said == (true > near)).mean(-1), atol=1e-6)


def queries_of(opened, ids, queries: range) -> xr.DataArray:
    from headwise.attention import Inputs

    with attend(opened, readings=[Inputs(("q",), queries=tuple(queries))]) as run, torch.no_grad():
        opened.model(input_ids=ids)
    return run.tree["text"]["input_q"]


def test_a_pass_shared_with_other_questions_changes_nothing() -> None:
    opened = llama()
    prompt = {"input_ids": random_tokens(opened, 1, 60, seed=1)}
    alone = scan.heads(opened, inputs=[prompt], questions=[LongContextHeads(**SMALL)])
    beside = scan.heads(
        opened, inputs=[prompt], questions=[LongContextHeads(**SMALL), "sinks", "entropy", "cmr_distance"]
    )
    for name in ("long_context_heads", "long_context_predicted", "long_context_correlation"):
        np.testing.assert_allclose(alone.heads[name], beside.heads[name], rtol=1e-5, atol=1e-6)
    histogram = alone.data["long_context_histogram"].sel(stream="text")
    np.testing.assert_allclose(histogram.sum("far_mass"), 1)


@pytest.mark.parametrize(("tau", "expected"), [(0, 0), (1.01, 1)])
def test_tau_0_makes_every_head_local_and_above_1_none(tau: float, expected: int) -> None:
    opened = llama()
    prompt = {"input_ids": random_tokens(opened, 1, 60, seed=1)}
    found = scan.heads(opened, inputs=[prompt], questions=[LongContextHeads(tau=tau, **SMALL)]).heads
    assert (found["long_context_heads"] == expected).all()
    assert (found["long_context_predicted"] == expected).all()


def test_heads_that_are_nearly_always_one_thing_are_that() -> None:
    assert [kind(share) for share in (0.0, 0.05, 0.5, 0.95, 1.0)] == [
        "always local",
        "always local",
        "switching",
        "always long",
        "always long",
    ]


def test_a_text_that_is_too_short_is_refused_with_the_length_wanted() -> None:
    opened = llama()
    question = LongContextHeads(**SMALL)
    least = 4 + 8 + 2 * 6 - 1
    assert len(question.spans(least)[0]) == 6
    with pytest.raises(HeadwiseError, match=f"at least {least} tokens.*got {least - 1}"):
        scan.heads(opened, inputs=[{"input_ids": random_tokens(opened, 1, least - 1, 0)}], questions=[question])


def test_scores_that_are_no_product_are_refused() -> None:
    draw = np.random.default_rng(0)
    dims = ("sample", "layer", "head", "query", "channel")
    q = xr.DataArray(draw.normal(size=(1, 1, 2, 8, 4)), dims=dims, coords={"query": range(8)})
    k = xr.DataArray(draw.normal(size=(1, 1, 2, 8, 4)), dims=dims, coords={"query": range(8)}).rename(query="key")
    dot = 0.5 * (q.values * k.values).sum(-1)[..., None]
    values = xr.Dataset({"input_q": q, "input_k": k, "scores": ((*dims[:4], "lag"), dot)}).assign_coords(lag=[9])
    np.testing.assert_allclose(scale(values), 0.5)
    with pytest.raises(HeadwiseError, match="those of layer 0 are not"):
        scale(values.assign(scores=np.tanh(values["scores"])))


@pytest.mark.parametrize("options", [{"tau": -0.1}, {"sink": -1}, {"local": 0}, {"queries": 1}])
def test_bad_options_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(HeadwiseError, match=f"LongContextHeads\\({name}"):
        LongContextHeads(**options)


def test_an_encoder_is_told_what_is_missing() -> None:
    with pytest.raises(HeadwiseError, match="decoder-only language model"):
        scan.heads(bert(), texts="A text.", questions=["long_context_heads"])
