"""Reference frames: stars, uniform maps, noise, and frames with one, two and many anchors."""

import networkx as nx
import numpy as np
import pytest
import torch
import xarray as xr

from headwise import scan
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.scan.attention_graph import LEVELS, betti0, betti1, laplacians, measures, symmetric
from headwise.scan.question import Prompt
from headwise.scan.reference_frames import ReferenceFrames, centralisation, frame_type, gini
from headwise.scan.spectrum import mp_outliers
from tests.scan.models import bert, llama


def full(weights: np.ndarray, causal: bool) -> xr.Dataset:
    """What Received and At(lags=[0]) read of weights [layer, head, query, key]."""
    n = weights.shape[-1]
    seen = np.tril(np.ones((n, n))).sum(0) if causal else np.full(n, n)
    dims = ("sample", "layer", "head", "key")
    own = np.diagonal(weights, axis1=2, axis2=3)[None]
    return xr.Dataset(
        {
            "received": (dims, weights.sum(2)[None]),
            "received_visible": (dims, np.broadcast_to(seen, own.shape).astype(float)),
            "at": (("sample", "layer", "head", "query", "lag"), own[..., None]),
        },
        coords={"lag": [0], "key": range(n), "query": range(n), "layer": range(len(weights))},
    )


def star(n: int, centres: list[int]) -> np.ndarray:
    weights = np.zeros((4, 2, n, n))
    weights[..., centres] = 1 / len(centres)
    return weights


def asked(weights: np.ndarray, causal: bool = False) -> tuple[xr.Dataset, dict]:
    values = ReferenceFrames().reduce(full(weights, causal), Prompt({}))
    return values, dict(ReferenceFrames().profiles(values))


def test_a_star_has_centralisation_one_and_the_known_laplacian() -> None:
    n = 9
    W = np.zeros((n, n))
    W[0, 1:] = W[1:, 0] = 1
    assert centralisation(xr.DataArray(W.sum(0), dims="key"), xr.DataArray(np.ones(n) > 0, dims="key")).item() == 1
    np.testing.assert_allclose(laplacians(W)[0], [0, *[1] * (n - 2), n], atol=1e-12)
    np.testing.assert_allclose(laplacians(W)[1], nx.normalized_laplacian_spectrum(nx.star_graph(n - 1)), atol=1e-12)
    found = measures(W, loops=True)
    assert found["star"] == pytest.approx(0.5)
    assert found["alignment"] == pytest.approx(0.5**0.5)
    assert set(found["betti0"]) == {1}
    assert set(found["betti1"]) == {0}
    assert float(asked(star(n, [0]))[0]["centralisation"][0, 0]) == pytest.approx(1)


def test_uniform_attention_of_an_encoder_has_no_origin() -> None:
    n = 12
    weights = np.full((4, 2, n, n), 1 / n)
    values, profiles = asked(weights)
    np.testing.assert_allclose(values["gini"], 0, atol=1e-12)
    np.testing.assert_allclose(values["centralisation"], 0, atol=1e-12)
    assert measures(weights[0, 0])["fiedler"] == pytest.approx(1)
    assert profiles["frame_type"].item() == "none"


@pytest.mark.parametrize(
    ("centres", "causal", "frame"),
    [
        ([0], False, "centralized"),
        ([0], True, "centralized"),
        ([0, -1], False, "bidirectional"),
        ([2, 4, 7], False, "distributed"),
        ([2], False, "mixed"),
    ],
)
def test_frames_have_the_names_of_their_anchors(centres: list[int], causal: bool, frame: str) -> None:
    assert asked(star(10, centres), causal)[1]["frame_type"].item() == frame


def test_the_rule_of_the_frames() -> None:
    assert frame_type(0.6, 0.0, 2) == "centralized"
    assert frame_type(0.7, 0.2, 2) == "bidirectional"
    assert frame_type(0.5, 0.1, 3) == "distributed"
    assert frame_type(0.5, 0.1, 2) == "mixed"
    assert frame_type(float("nan"), float("nan"), float("nan")) == "none"


def test_gini_is_the_mean_difference() -> None:
    x = np.random.default_rng(0).random((2, 7))
    x[1, 6] = np.nan
    found = gini(xr.DataArray(x, dims=("head", "key")))
    for row, value in zip(x, found.values, strict=True):
        row = row[~np.isnan(row)]
        slow = np.abs(row[:, None] - row).mean() / (2 * row.mean())
        assert value == pytest.approx(slow)


def test_components_are_those_of_the_thresholded_graph() -> None:
    W = symmetric(np.random.default_rng(1).dirichlet(np.full(15, 0.2), 15))
    slow = []
    for level in LEVELS:
        graph = nx.from_numpy_array((W / W.max() >= level).astype(int))
        slow.append(nx.number_connected_components(graph))
    assert betti0(W) == slow


def test_loops_are_those_of_the_clique_complex() -> None:
    """Against ranks of the boundary matrices over the field of two elements, level by level."""
    W = symmetric(np.random.default_rng(2).dirichlet(np.full(9, 0.5), 9))
    slow = []
    for level in LEVELS:
        graph = nx.from_numpy_array((W / W.max() >= level).astype(int))
        graph.remove_edges_from(nx.selfloop_edges(graph))
        edges = [tuple(sorted(e)) for e in graph.edges]
        filled = [tuple(sorted(c)) for c in nx.enumerate_all_cliques(graph) if len(c) == 3]
        sides = [sum(1 << edges.index(p) for p in ((a, b), (a, c), (b, c))) for a, b, c in filled]
        slow.append(len(edges) - (9 - nx.number_connected_components(graph)) - rank(sides))
    assert betti1(W) == slow
    assert max(slow) > 0
    ring = nx.to_numpy_array(nx.cycle_graph(8))
    assert set(betti1(ring)) == {1}


def rank(columns: list[int]) -> int:
    pivots: dict[int, int] = {}
    for column in columns:
        while column and column.bit_length() in pivots:
            column ^= pivots[column.bit_length()]
        if column:
            pivots[column.bit_length()] = column
    return len(pivots)


@pytest.mark.parametrize("model", [llama, bert])
def test_the_question_equals_the_dense_maps(model) -> None:
    opened = model()
    text = "the rabbit and the queen went to the sea and it was not there"
    table = scan.heads(opened, texts=[text], questions=[ReferenceFrames()]).heads
    with attend(opened, readings=[Map()]) as run, torch.no_grad():
        opened.model(**opened.encode(text))
    maps = next(iter(run.tree.children.values()))["map"].values[0].astype(float)
    n = maps.shape[-1]
    for row in table.itertuples():
        a = maps[row.layer, row.head]
        degree = symmetric(a).sum(0)
        slow = (degree.max() - degree).sum() / (degree.sum() / 2 * (n - 2))
        assert row.reference_frames == pytest.approx(slow, abs=1e-5)
        assert row.anchor_first == pytest.approx(a[1:, 0].mean(), abs=1e-5)
        last = np.nan if model is llama else pytest.approx(a[:-1, -1].mean(), abs=1e-5)
        assert np.isnan(row.anchor_last) if model is llama else row.anchor_last == last


def test_graphs_of_chosen_heads_come_one_map_at_a_time() -> None:
    opened = llama()
    batch = {"input_ids": torch.arange(4, 16)[None]}
    found = scan.attention_graphs(opened, batch, [(1, 2), (0, 3)], loops=True)
    with attend(opened, readings=[Map(layers=1, heads=2)]) as run, torch.no_grad():
        opened.model(**batch)
    slow = measures(run.tree["text"]["map"].values[0, 0, 0], loops=True)
    for name, value in slow.items():
        np.testing.assert_allclose(found[name].isel(pair=0), value, atol=1e-6)


def test_noise_has_no_outliers_and_planted_structure_has() -> None:
    torch.manual_seed(0)
    noise = torch.randn(150, 400)
    clean = mp_outliers(noise)
    assert clean.count == 0
    assert clean.largest < 1
    assert clean.largest > 0.9, "the edge is where the noise ends"
    assert clean.edge == pytest.approx((1 + (150 / 400) ** 0.5) ** 2, rel=0.1)
    assert mp_outliers(noise.T).count == 0
    planted = noise + 3 * torch.outer(torch.randn(150), torch.randn(400))
    assert mp_outliers(planted).count == 1
    assert mp_outliers(planted).gap > 5 > clean.gap
    assert mp_outliers(planted).participation < clean.participation


def test_fisher_is_the_mean_squared_gradient_of_each_head() -> None:
    opened = llama()
    texts = ["the rabbit went to the sea", "and the queen was not there"]
    found = scan.attention_fisher(opened, texts=texts)
    site = opened.sites[1]
    slow_o = torch.zeros(4)
    slow_k = torch.zeros(2)
    for text in texts:
        opened.model.zero_grad()
        ids = opened.encode(text)["input_ids"]
        opened.model(ids, labels=ids).loss.backward()
        slow_o += site.module.o_proj.weight.grad.view(32, 4, 8).pow(2).mean((0, 2)) / 2
        slow_k += site.module.k_proj.weight.grad.view(2, 8, 32).pow(2).mean((1, 2)) / 2
    opened.model.zero_grad()
    np.testing.assert_allclose(found.sel(matrix="o", layer=1), slow_o, rtol=1e-4)
    np.testing.assert_allclose(found.sel(matrix="k", layer=1), slow_k.repeat_interleave(2), rtol=1e-4)


def test_bad_input_is_refused_with_the_argument_named() -> None:
    with pytest.raises(HeadwiseError, match="threshold"):
        ReferenceFrames(threshold=0)
    with pytest.raises(HeadwiseError, match="attention: wanted the whole map"):
        measures(np.ones((200, 200)))
    with pytest.raises(HeadwiseError, match="at most 64"):
        betti1(np.ones((70, 70)))
    with pytest.raises(HeadwiseError, match="matrix"):
        mp_outliers(torch.ones(4, 4))
    with pytest.raises(HeadwiseError, match="texts"):
        scan.attention_fisher(llama())
