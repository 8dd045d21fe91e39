"""Taylor orders of the exponential: against exact fractions, a slow reference of a whole matrix, and their limits."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import T5Config, T5ForConditionalGeneration

from headwise import scan
from headwise.attention import Scores, attend
from headwise.errors import HeadwiseError
from headwise.models import open_model
from headwise.scan.taylor import HeadOrders, TaylorOrders, blocks, orders_needed, series
from headwise.scan.tokens import random_tokens
from headwise.study.taylor_spectrum import against_layer, taylor_spectrum
from tests.scan.models import bert, llama


@pytest.mark.parametrize("orders", [2, 64, 128])
def test_the_series_is_exact_also_where_its_terms_cancel(orders: int) -> None:
    scores = [-130.0, -64.0, -63.5, -40.5, -20.0, -1.5, 0.0, 0.5, 7.0, 100.0]
    terms, sums = series(np.array(scores), orders)
    for n, s in enumerate(scores):
        exact = [Fraction(s) ** m / math.factorial(m) for m in range(orders + 1)]
        np.testing.assert_allclose(terms[:, n], [float(x) for x in exact], rtol=1e-12)
        np.testing.assert_allclose(sums[:, n], [float(sum(exact[: m + 1])) for m in range(orders + 1)], rtol=1e-9)


def slow(row: np.ndarray, orders: int) -> dict:
    """One query's scores, by the definitions."""
    weights = np.exp(row) / np.exp(row).sum()
    terms = np.array([[s**n / math.factorial(n) for s in row] for n in range(orders + 1)])
    error = []
    for m in range(orders + 1):
        cut = terms[: m + 1].sum(0)
        apart = np.abs(cut / cut.sum() - weights).sum() / 2 if cut.sum() > 0 else 1
        error.append(min(apart, 1))
    size = np.exp(np.abs(row))
    return {
        "share": np.abs(terms).sum(1) / size.sum(),
        "error": np.array(error),
        "mean": (np.abs(row) * size).sum() / size.sum(),
        "terms": np.abs(terms),
    }


@pytest.mark.parametrize("make", [llama, bert])
def test_the_question_is_the_slow_reference_of_the_whole_matrix(make) -> None:
    opened = make()
    opened.model.double()
    ids = random_tokens(opened, 1, 40, seed=0)
    question = TaylorOrders(orders=12, rows=40)
    found = scan.heads(opened, inputs=[{"input_ids": ids}], questions=[question]).data.sel(stream="text")
    with attend(opened, readings=[Scores(targets=torch.arange(40).expand(40, 40))]) as run, torch.no_grad():
        opened.model(input_ids=ids)
    scores = run.tree["text"]["scores"].isel(sample=0).transpose("layer", "head", "query", "target").values
    for layer, head in ((0, 0), (1, 3)):
        rows = [slow(row[~np.isnan(row)], 12) for row in scores[layer, head].astype(float)]
        mine = found.sel(layer=layer, head=head)
        spectrum = np.concatenate([row["terms"] for row in rows], 1).mean(1)
        error = np.array([row["error"] for row in rows])
        np.testing.assert_allclose(mine["taylor_spectrum"], spectrum, rtol=1e-5)
        np.testing.assert_allclose(mine["taylor_share"], np.mean([row["share"] for row in rows], 0), rtol=1e-5)
        np.testing.assert_allclose(mine["taylor_error"], error.mean(0), atol=1e-5)
        assert float(mine["taylor_mean_order"]) == pytest.approx(np.mean([row["mean"] for row in rows]), rel=1e-5)
        assert float(mine["taylor_error_2"]) == pytest.approx(error[:, 2].mean(), abs=1e-5)
        assert float(mine["taylor_error_2_sem"]) == pytest.approx(error[:, 2].std(ddof=1) / 40**0.5, rel=1e-4)
        above = np.flatnonzero(error.mean(0) > 0.05)
        assert int(mine["taylor_orders"]) == (above.max() + 1 if len(above) else 0)


def test_scores_of_zero_need_no_order_and_ever_larger_ones_more() -> None:
    opened = llama()
    inputs = [{"input_ids": random_tokens(opened, 1, 48, seed=1)}]
    needed = []
    for scale in (0.0, 1.0, 3.0):
        model = llama()
        for site in model.sites:
            site.module.q_proj.weight.data.mul_(scale)
        table = scan.heads(model, inputs=inputs, questions=["taylor_orders"]).heads
        needed.append((table["taylor_orders"].mean(), table["taylor_mean_order"].mean()))
    assert needed[0] == (0, 0)
    assert needed[0] < needed[1] < needed[2]


def test_sixty_orders_are_the_softmax_for_scores_below_eight() -> None:
    scores = np.random.default_rng(0).uniform(-8, 8, (20, 30))
    one = HeadOrders.of(scores, 60)
    assert one.error[:, 60].max() < 1e-6
    np.testing.assert_allclose(one.share.sum(1), 1, atol=1e-9)


def test_a_negative_sum_is_no_attention_and_unseen_keys_do_not_count() -> None:
    row = np.array([[-3.0, -4.0, np.nan, -np.inf], [np.nan] * 4, [0.0, 900.0, np.nan, np.nan]])
    one = HeadOrders.of(row, 8)
    assert len(one.error) == 2, "a row that sees nothing is left out"
    assert one.error[0, 1] == 1, "1 - 3 and 1 - 4 are below 0"
    both = HeadOrders.of(row[:1, :2], 8)
    np.testing.assert_allclose(one.error[0], both.error[0])
    assert one.error[1, 0] == pytest.approx(0.5)
    assert one.error[1, 1] == pytest.approx(1 / 902)
    assert np.isfinite(one.share).all()


def test_blocks_hold_every_row_once() -> None:
    counts = [2000, 100, 5000, 1, 1]
    found = list(blocks(counts))
    assert [n for rows in found for n in range(5)[rows]] == list(range(5))
    assert len(found) == 4


def test_the_order_needed_is_the_one_after_the_last_that_is_off() -> None:
    error = xr.DataArray([[[1, 0.01, 0.2, 0.03], [0, 0, 0, 0]], [[1, 1, 1, 0.2], [np.nan] * 4]],
                         dims=("layer", "head", "order"), coords={"order": range(4)})  # fmt: skip
    np.testing.assert_array_equal(orders_needed(error, 0.05), [[3, 0], [4, np.nan]])


@pytest.mark.parametrize("options", [{"orders": 1}, {"orders": 129}, {"within": 0.0}, {"rows": 0}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(HeadwiseError, match=f"TaylorOrders\\({next(iter(options))}"):
        TaylorOrders(**options)


def test_the_study_tells_nothing_about_a_model_that_is_its_own_control() -> None:
    found = taylor_spectrum(llama(), TaylorOrders(orders=16, rows=4), texts=2, length=24, draws=50)
    assert found.verdict == "fails"
    assert sum(found.measured["share_by_order"]) <= 1 + 1e-9
    assert len(found.measured["share_by_order"]) == 17
    assert found.measured["mean_order_untrained"] == found.measured["mean_order"]
    assert found.measured["mean_order"][1] > 1


def test_sink_heads_are_compared_within_their_layers() -> None:
    layers = np.repeat(np.arange(6), 8)
    chosen = np.tile(np.arange(8) < 3, 6)
    rng = np.random.default_rng(0)
    deep = 100.0 * layers + rng.normal(size=48)
    more, chance = against_layer(deep + 5 * chosen, chosen, layers, 200)
    assert more == pytest.approx(5, abs=1)
    assert chance < 0.01
    assert against_layer(deep, (layers > 3), layers, 200)[1] > 0.5, "what differs between layers only does not count"
    assert against_layer(deep, np.zeros(48, bool), layers, 200) == (0.0, 1.0)


def test_a_decoder_that_reads_more_than_its_encoder_is_read_whole() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    opened = open_model(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval())
    inputs = {"input_ids": torch.arange(3, 13)[None], "decoder_input_ids": torch.arange(3, 33)[None]}
    found = scan.heads(opened, inputs=[inputs], questions=[TaylorOrders(orders=12, rows=30)]).data
    with attend(opened, readings=[Scores(lags=tuple(range(30)), stream="decoder")]) as run, torch.no_grad():
        opened.model(**inputs)
    rows = run.tree["decoder"]["scores"].isel(sample=0, layer=0, head=1).values.astype(float)
    wanted = np.mean([slow(row[~np.isnan(row)], 12)["share"] for row in rows], 0)
    np.testing.assert_allclose(found["taylor_share"].sel(stream="decoder")[0, 1], wanted, rtol=1e-5)
    assert found["taylor_orders"].sel(stream="encoder").notnull().all()
