"""First-token sinks: rates by position and threshold, what makes them, and what they keep from mixing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from headwise import scan
from headwise.attention import HeadOutput, Inputs, Map, ScoreBias, attend
from headwise.errors import HeadwiseError
from headwise.scan.question import Prompt
from headwise.scan.sink_anatomy import SinkAnatomy, token_kinds
from headwise.scan.sinks import LEVELS, Sinks, later_share
from tests.scan.models import bert, llama

TEXT = "the rabbit ran away and Alice went after it at once. "


def uniform(n: int) -> np.ndarray:
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]


def values(weights: np.ndarray) -> xr.Dataset:
    """What Received, Mass and At(lags=[0]) read, for causal weights [head, query, key] of one layer."""
    seen = np.broadcast_to(np.tril(np.ones(weights.shape[1:])).sum(0), (1, 1, *weights.shape[::2])).copy()
    dims, own = ("sample", "layer", "head", "key"), np.diagonal(weights, axis1=1, axis2=2)
    mass = xr.DataArray(weights[None, :, :, :1].mean(2), dims=("layer", "head", "segment"))
    return xr.Dataset(
        {
            "received": (dims, weights.sum(1)[None, None]),
            "received_visible": (dims, seen),
            "at": (("sample", "layer", "head", "query", "lag"), own[None, None, :, :, None]),
            "mass": mass.assign_coords(segment=["first"]),
        },
        coords={"lag": [0], "key": range(weights.shape[2]), "query": range(weights.shape[1])},
    )


def test_alpha_of_uniform_attention_is_counted_at_every_position() -> None:
    n = 20
    found = Sinks(positions=n).reduce(values(uniform(n)[None]), Prompt({}))
    expected = [np.mean([1 / i for i in range(k, n + 1)]) for k in range(1, n + 1)]
    np.testing.assert_allclose(found["alpha"][0, 0], expected)
    above = np.array(expected)[:, None] > LEVELS
    np.testing.assert_array_equal(found["rate"][0, 0].transpose("position", "threshold"), above)


def test_a_sink_at_the_second_token_has_its_rate_there() -> None:
    weights = np.zeros((1, 12, 12))
    weights[0, 0, 0], weights[0, 1:, 1] = 1, 1
    rate = Sinks().profiles(Sinks().reduce(values(weights), Prompt({})))["sink_rate"].sel(threshold=0.3)
    assert rate[0, 0, :3].values.tolist() == [0, 1, 0]


def test_the_share_from_later_queries_leaves_the_diagonal_out() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(6), 6) * np.tril(np.ones((6, 6)))
    share = later_share(values(weights[None]))[0, 0, 0].values
    expected = [weights[j + 1 :, j].mean() for j in range(5)]
    np.testing.assert_allclose(share[:5], expected)
    assert np.isnan(share[5])


def test_dropped_queries_count_for_nothing() -> None:
    opened = llama()
    found = scan.heads(opened, texts=[TEXT], questions=[Sinks(drop_first=4)]).heads["sinks"].to_numpy()
    with attend(opened, readings=[Map()]) as run, torch.no_grad():
        opened.model(**opened.encode(TEXT))
    weights = run.tree["text"]["map"].values[0]
    np.testing.assert_allclose(found, weights[:, :, 4:, 0].mean(-1).ravel(), atol=1e-5)


def test_the_anatomy_equals_the_slow_reference() -> None:
    opened = llama()
    batch = opened.encode(TEXT)
    n = batch["input_ids"].shape[1]
    found = scan.heads(opened, texts=[TEXT], questions=[SinkAnatomy(resting=0.2)])
    captured = {}
    with attend(opened, readings=[Map(), Inputs(), HeadOutput()]) as run, torch.no_grad():
        opened.model(**batch)
    node = run.tree["text"]
    q, k, v = (node[f"input_{w}"].values[0].astype(float) for w in "qkv")
    a, size = node["map"].values[0].astype(float), node["head_output_norm"].values[0]
    cosine = np.einsum("lhqc,lhkc->lhqk", q, k) / np.linalg.norm(q, axis=-1)[..., None]
    cosine /= np.linalg.norm(k, axis=-1)[:, :, None]
    earlier = np.stack([cosine[:, :, i, 1 : i + 1].mean(-1) for i in range(1, n)], -1).mean(-1)
    captured["sink_anatomy"] = cosine[:, :, 1:, 0].mean(-1) - earlier
    for name, x in (("sink_key_norm", k), ("sink_value_norm", v)):
        norm = np.linalg.norm(x, axis=-1)
        captured[name] = norm[..., 0] / norm[..., 1:].mean(-1)
    norm = np.linalg.norm(v, axis=-1)
    first = a[..., 0].sum(-1) * norm[..., 0]
    captured["sink_flow"] = first / (first + a[..., 1:].sum((-1, -2)) * norm[..., 1:].mean(-1))
    rest = a[:, :, 1:, 0] > 0.2
    with np.errstate(invalid="ignore"):
        means = [np.where(m, size[:, :, 1:], 0).sum(-1) / m.sum(-1) for m in (rest, ~rest)]
    captured["sink_output"] = means[0] / means[1]
    for column, expected in captured.items():
        np.testing.assert_allclose(found.heads[column], expected.ravel(), rtol=1e-3, atol=1e-5, err_msg=column)
    assert found.data["hidden_ratio"].shape == (1, 2)
    words = np.array(token_kinds(opened, batch["input_ids"][0].tolist()))[1:] == "word"
    by_word = found.data["sink_by_token"].sel(token_kind="word", stream="text").transpose("layer", "head")
    np.testing.assert_allclose(by_word, a[:, :, 1:, 0][:, :, words].mean(-1), atol=1e-5)


def test_kinds_of_tokens() -> None:
    written = {1: "\u0120Sun", 2: "day", 3: ".", 4: "<s>", 5: "\u0120", 6: "19"}
    fake = SimpleNamespace(all_special_ids=[4], convert_ids_to_tokens=lambda ids: [written[i] for i in ids])
    opened = SimpleNamespace(tokenizer=fake, decode=lambda ids: written[ids[0]].replace("\u0120", " "))
    kinds = token_kinds(opened, [4, 1, 2, 3, 5, 6, 2])
    assert kinds == ["other", "word", "piece", "punctuation", "other", "number", "piece"]
    words = llama()
    ids = words.tokenizer.convert_tokens_to_ids(["the", "and"])
    assert token_kinds(words, ids) == ["word", "word"], "a vocabulary of whole words marks nothing"


def test_spread_is_zero_for_equal_tokens_and_as_measured_for_others() -> None:
    opened = llama()
    same = scan.collapse_curves(opened, {"input_ids": torch.full((1, 9), 7)})
    assert float(same["relative_spread"].max()) < 1e-5
    ids = torch.arange(5, 17)[None]
    found = scan.collapse_curves(opened, {"input_ids": ids}, drop_first=0)
    with torch.no_grad():
        x = opened.model(ids, output_hidden_states=True).hidden_states[1][0].double()
    assert float(found["spread"][0]) == pytest.approx(float((x - x.mean(0)).norm()), rel=1e-5)
    assert float(found["last_step"][0]) == pytest.approx(float((x[-1] - x[-2]).norm()), rel=1e-5)
    with pytest.raises(HeadwiseError, match="at least 2 tokens"):
        scan.collapse_curves(opened, {"input_ids": ids[:, :2]})


def test_the_mixing_bound_is_the_product_of_the_maps() -> None:
    opened = llama()
    batch = {"input_ids": torch.arange(5, 17)[None]}
    with attend(opened, readings=[Map()]) as run, torch.no_grad():
        opened.model(**batch)
    maps = run.tree["text"]["map"].values[0].astype(float)
    product = np.eye(12)
    for layer in maps:
        product = (layer.sum(0) + np.eye(12)) @ product / 5
    np.testing.assert_allclose(product.sum(-1), 1, atol=1e-5)
    bound = scan.mixing_bound(opened, batch, sources=[0, 3, 11])
    np.testing.assert_allclose(bound[-1].values, product[:, [0, 3, 11]], atol=1e-6)
    identity = scan.mixing_bound(opened, batch, sources=[3], without=[(n, h) for n in range(2) for h in range(4)])
    np.testing.assert_allclose(identity[-1, :, 0], np.eye(12)[3] / 25, atol=1e-7)


def test_heads_on_the_first_token_leave_only_the_identity_path() -> None:
    """All attention knocked out but that to the first token: one-hot maps."""
    opened = llama()
    batch = {"input_ids": torch.arange(5, 17)[None]}
    with attend(opened, edits=[ScoreBias(value=-float("inf"), keys="rest")]):
        bound = scan.mixing_bound(opened, batch, sources=[4])
    np.testing.assert_allclose(bound[-1, :, 0], np.eye(12)[4] / 25, atol=1e-7)


def test_bad_input_is_refused_with_the_argument_named() -> None:
    opened = llama()
    with pytest.raises(HeadwiseError, match=r"drop_first=\.\.\."):
        Sinks(drop_first=-1)
    with pytest.raises(HeadwiseError, match=r"positions=\.\.\."):
        Sinks(positions=0)
    with pytest.raises(HeadwiseError, match="drop_first=400"):
        scan.heads(opened, texts=[TEXT], questions=[Sinks(drop_first=400)])
    with pytest.raises(HeadwiseError, match=r"resting=\.\.\."):
        SinkAnatomy(resting=1.0)
    with pytest.raises(HeadwiseError, match="sources"):
        scan.mixing_bound(opened, {"input_ids": torch.arange(9)[None]}, sources=[9])
    with pytest.raises(HeadwiseError, match="language model"):
        scan.heads(bert(), texts=[TEXT], questions=[SinkAnatomy()])
