"""Concentration, focus, diversity and dependence on the input against dense maps and their limits."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.scan.dependence import InputDependence, row_distance
from headwise.scan.mixing import Concentration, head_diversity
from headwise.scan.needles import haystack
from tests.scan.models import bert, circuit, llama

TEXT = haystack()[:260]


def eager(opened, ids) -> np.ndarray:
    """[layer, sample, head, query, key]"""
    opened.model.set_attn_implementation("eager")
    with torch.no_grad():
        found = opened.model(input_ids=ids, output_attentions=True).attentions
    opened.model.set_attn_implementation("sdpa")
    return torch.stack(found).double().numpy()


@pytest.mark.parametrize("make", [llama, bert])
def test_indicators_equal_those_of_dense_maps(make) -> None:
    opened = make()
    batch = opened.encode(TEXT)
    maps = eager(opened, batch["input_ids"])[:, 0]
    n = maps.shape[-1]
    data = scan.heads(opened, inputs=batch, questions=[Concentration(rows=n)]).data.sel(stream="text")
    np.testing.assert_allclose(data["concentration"], np.linalg.norm(maps, axis=(2, 3)), rtol=1e-5)
    assert (data["concentration_sem"] == 0).all()
    for lag in range(4):
        np.testing.assert_allclose(data[f"focus_{lag}"], np.diagonal(maps, -lag, 2, 3).mean(-1), atol=1e-6)
    cells = np.tril_indices(n) if make is llama else np.indices((n, n)).reshape(2, -1)
    np.testing.assert_allclose(data["head_diversity"], maps.std(1)[:, cells[0], cells[1]].mean(-1), rtol=1e-5)


def test_random_rows_come_with_an_error_that_holds() -> None:
    opened = llama()
    batch = opened.encode(haystack()[:3000])
    whole, some = (scan.heads(opened, inputs=batch, questions=[Concentration(rows=r)]).data for r in (1000, 100))
    gap = np.abs(some["concentration"] - whole["concentration"]) / some["concentration_sem"]
    assert 0 < float(gap.mean()) < 2
    np.testing.assert_allclose(some["head_diversity"], whole["head_diversity"], rtol=0.2)


def test_a_map_on_one_token_has_the_norm_of_its_rows_and_a_lone_head_no_diversity() -> None:
    words = " ".join(haystack().split()[:12])
    found = scan.heads(circuit(), texts=words, questions=[Concentration()]).data.sel(stream="text", layer=0)
    n = circuit().encode(words)["input_ids"].shape[1]
    # The head that looks one back: row 0 can only see itself.
    assert float(found["concentration"][0]) == pytest.approx(n**0.5, rel=1e-4)
    assert float(found["focus_1"][0]) == pytest.approx(1, abs=1e-5)
    assert float(found["focus_0"][0]) == pytest.approx(1 / n, abs=1e-5)
    assert float(found["head_diversity"]) == 0


def test_diversity_of_two_opposite_heads() -> None:
    n = 6
    one, other = np.zeros((2, n, n))
    one[:, 0], other[np.arange(n), np.arange(n)] = 1, 1
    causal = head_diversity(np.stack([one, other])[None], range(n))
    assert causal == pytest.approx((n - 1) * 2 * 0.5 / (n * (n + 1) / 2))
    missing = np.full((1, n, n), np.nan)
    assert head_diversity(np.concatenate([[one], [other], missing])[None], range(n)) == pytest.approx(causal)


def test_fixed_maps_do_not_depend_on_the_input_and_others_do() -> None:
    opened = llama()
    question = InputDependence(sequences=3, length=20, rows=20)
    (prompt,) = question.prompts(opened)
    maps = eager(opened, prompt.inputs["input_ids"])
    wanted = np.stack([row_distance(layer) for layer in maps])
    found = scan.heads(opened, questions=[question]).data["input_dependence"].sel(stream="text")
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    with torch.no_grad():
        opened.model.model.layers[0].self_attn.q_proj.weight.zero_()
    fixed = scan.heads(opened, questions=[question]).data["input_dependence"].sel(stream="text")
    assert float(fixed.sel(layer=0).max()) < 1e-6 < float(fixed.sel(layer=1).min())


def test_maps_that_never_overlap_are_at_distance_one() -> None:
    maps = np.eye(4)[:, None, None, :]
    np.testing.assert_allclose(row_distance(maps), [1])


def test_bad_options_are_refused() -> None:
    with pytest.raises(HeadwiseError, match=r"rows=...\) must be at least 1 row of the map; got 0"):
        Concentration(rows=0)
    with pytest.raises(HeadwiseError, match=r"sequences=...\) must be at least 2; got 1"):
        InputDependence(sequences=1)
    with pytest.raises(HeadwiseError, match="at most 1024 tokens here; got 5000"):
        scan.heads(llama(), questions=[InputDependence(length=5000)])
    assert "tokenizer" in InputDependence().lacks(scan_without_tokenizer())


def scan_without_tokenizer():
    opened = llama()
    opened.tokenizer = None
    return opened
