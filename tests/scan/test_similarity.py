"""Similarity of features: the measures' limit cases and a slow reference; layers of tiny models."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.scan.similarity import MEASURES, _leading, baseline, maxcorr, mincorr, similarity
from tests.scan.models import bert, llama

METHODS = list(MEASURES)
TEXTS = ["It is a truth universally acknowledged, that a single man", "must be in want of a wife."]


def features(rows: int = 80, columns: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)


def rotation(size: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("method", METHODS)
def test_equal_features_have_similarity_1_and_unrelated_ones_less(method: str) -> None:
    x = features()
    assert similarity(x, x, method) == pytest.approx(1, abs=1e-9)
    assert similarity(x, features(seed=1), method) < 0.6


@pytest.mark.parametrize("method", ["lincka", "lincka_debiased", "rbfcka", "linreg"])
def test_a_rotation_and_a_scale_change_nothing(method: str) -> None:
    x = features()
    assert similarity(x, 3 * x @ rotation(6), method) == pytest.approx(1, abs=1e-9)


def test_linreg_and_full_svcca_survive_any_invertible_map() -> None:
    x = features()
    y = x @ features(6, seed=2)
    assert similarity(x, y, "linreg") == pytest.approx(1)
    assert similarity(x, y, "svcca", var=1.0) == pytest.approx(1)
    assert similarity(x, y, "lincka") < 0.9


def test_a_rotation_hides_single_neurons() -> None:
    """The card's figure: 0.17 for white features of 384 columns and 4,000 rows."""
    x = torch.randn(4000, 384, generator=torch.Generator().manual_seed(0))
    found = float(maxcorr(x, x @ rotation(384).float()).mean())
    assert found == pytest.approx(0.17, abs=0.01)


def test_the_measures_equal_slow_references() -> None:
    x, y = features(30, 4).numpy(), features(30, 5, seed=1).numpy()
    corr = np.abs([[np.corrcoef(a, b)[0, 1] for b in y.T] for a in x.T])
    assert similarity(x, y, "maxcorr") == pytest.approx(corr.max(1).mean())
    standard_x, standard_y = ((z - z.mean(0)) / z.std(0) for z in (x, y))
    fits = [np.linalg.lstsq(standard_y, a, rcond=None)[0] for a in standard_x.T]
    multiple = [np.corrcoef(a, standard_y @ w)[0, 1] for a, w in zip(standard_x.T, fits, strict=True)]
    assert similarity(x, y, "linreg") == pytest.approx(np.mean(multiple))
    a, b = x - x.mean(0), y - y.mean(0)
    cka = np.linalg.norm(b.T @ a) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert similarity(x, y, "lincka") == pytest.approx(cka)
    assert similarity(x, y, "lincka_debiased") == pytest.approx(
        hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)), abs=1e-12
    )


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, by its definition (Song et al., 2012, equation 5)."""
    k, l = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    n, one = len(k), np.ones(len(k))
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return float((np.trace(k @ l) + middle) / (n * (n - 3)))


def test_pwcca_with_equal_weights_is_svcca() -> None:
    """Each direction of y is one column of x with noise, so that the canonical directions are the columns of x, all of
    norm 1."""
    basis = torch.linalg.qr(torch.cat([torch.ones(100, 1, dtype=torch.float64), features(100, 8)], 1))[0][:, 1:]
    x, noise = basis[:, :4], basis[:, 4:]
    strength = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=x.dtype)
    y = x + strength * noise
    assert similarity(x, y, "svcca", var=1.0) == pytest.approx(float((1 + strength**2).rsqrt().mean()))
    assert similarity(x, y, "pwcca", var=1.0) == pytest.approx(similarity(x, y, "svcca", var=1.0))


@pytest.mark.parametrize(("var", "kept"), [(0.99, 2), (0.71, 1), (0.5, 1), (1.0, 3)])
def test_svcca_leaves_the_direction_out_that_crosses_the_share(var: float, kept: int) -> None:
    basis = torch.linalg.qr(features(40, 3))[0]
    assert _leading(basis * torch.tensor([0.7, 0.2, 0.1], dtype=basis.dtype).sqrt(), var).shape == (40, kept)


def test_mincorr_is_the_lowest_over_the_other_models() -> None:
    x = features()
    shared = torch.cat([x[:, :1], features(seed=3)[:, 1:]], 1)
    found = mincorr(x, [x, shared])
    torch.testing.assert_close(found[0], torch.tensor(1.0, dtype=found.dtype))
    assert (found[1:] < 0.9).all()
    torch.testing.assert_close(found, torch.minimum(maxcorr(x, x), maxcorr(x, shared)))


def test_constant_columns_are_left_out() -> None:
    x = features()
    y = torch.cat([x, torch.full((len(x), 1), 7.0, dtype=x.dtype)], 1)
    for method in METHODS:
        assert similarity(y, x, method) == pytest.approx(1, abs=1e-9)
    assert maxcorr(y, x)[-1].isnan()


def test_shuffled_rows_show_the_bias_of_few_rows() -> None:
    x = features(12, 6)
    assert baseline(x, x, "linreg", draws=3) > 0.5
    assert abs(baseline(features(60), features(60), "lincka_debiased", draws=20)) < 0.1


def test_layers_of_one_model_and_of_two() -> None:
    one, other = llama(), bert()
    same = scan.layer_similarity(one, one, TEXTS)
    assert same.dims == ("layer_a", "layer_b")
    np.testing.assert_allclose(np.diag(same), 1)
    np.testing.assert_allclose(same, same.T, atol=1e-12)
    across = scan.layer_similarity(one, other, TEXTS, "svcca", rows="word")
    assert across.shape == (2, 2)
    assert across.attrs == {"method": "svcca", "rows": "word", "model_a": one.name, "model_b": other.name}


def test_features_of_words_are_means_of_their_pieces() -> None:
    opened = llama()
    text = "my dear sir, said he."
    tokens = scan.layer_features(opened, [text])
    words = scan.layer_features(opened, [text], "word")
    pieces = [opened.tokenizer(w, add_special_tokens=False)["input_ids"] for w in text.split()]
    start = 0
    for n, piece in enumerate(pieces):
        torch.testing.assert_close(words[:, n], tokens[:, start : start + len(piece)].mean(1))
        start += len(piece)
    assert words.shape[1] == len(pieces) == 5
    torch.testing.assert_close(scan.layer_features(opened, [text], "mean")[:, 0], tokens.mean(1))
    torch.testing.assert_close(scan.layer_features(opened, [text], "last")[:, 0], tokens[:, -1])


def test_heads_outputs_make_up_what_attention_writes() -> None:
    from headwise.attention.hidden import record

    opened = llama()
    heads = scan.head_features(opened, TEXTS[:1])
    assert heads.shape[:2] == (2, 4)
    written = record(opened, opened.encode(TEXTS[0]), ("attention_out",))["attention_out"][:, 0]
    for site, z, whole in zip(opened.sites, heads, written, strict=True):
        torch.testing.assert_close(torch.einsum("htd,hdm->tm", z, site.W_O), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: similarity(x, x[:-1]), "the same rows"),
        (lambda x: similarity(x, x, "cosine"), "method"),
        (lambda x: similarity(x, x, var=0), "var"),
        (lambda x: similarity(x, x, "rbfcka", bandwidth=-1), "bandwidth"),
        (lambda x: similarity(x * float("nan"), x), "finite"),
        (lambda x: similarity(x[0], x), "features"),
        (lambda x: mincorr(x, []), "others"),
        (lambda x: scan.layer_features(llama(), TEXTS, "sentence"), "rows"),
        (lambda x: scan.layer_features(llama(), "one text"), "inputs"),
        (lambda x: scan.layer_features(llama(), [torch.tensor([[3, 4]])], "word"), "words"),
        (lambda x: scan.layer_features(llama(), [TEXTS]), "one text"),
        (lambda x: scan.layer_features(llama(), TEXTS, stream="vision"), "stream"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        call(features())  # type: ignore[operator]
