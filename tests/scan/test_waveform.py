"""The rotary waveform against plain loops, and heads that follow it or don't."""

import numpy as np
import pandas as pd
import pytest
import torch

from headwise import scan
from headwise.attention import Map, attend
from headwise.attention.waveform import ripples
from headwise.errors import HeadwiseError
from headwise.scan.waveform import WaveformHeads, rank_correlation
from tests.scan.models import bert, llama


def test_the_waveform_is_the_mean_modulus_of_partial_sums() -> None:
    base, width, reach = 10000.0, 8, 30
    for s, found in enumerate(scan.rope_waveform(scan.rope_frequencies(base, width), reach)):
        sums = [abs(sum(np.exp(1j * s * base ** (-2 * j / width)) for j in range(i))) for i in range(1, width // 2 + 1)]
        assert found == pytest.approx(2 / width * sum(sums), abs=1e-12)


@pytest.mark.parametrize("width", [2, 64, 128])
def test_at_distance_0_all_pairs_add_up(width: int) -> None:
    wave = scan.rope_waveform(scan.rope_frequencies(500000.0, width), 50)
    assert wave[0] == pytest.approx((width / 2 + 1) / 2)
    assert wave.max() <= wave[0] + 1e-12
    assert width > 2 or np.allclose(wave, 1), "one pair alone has no ripples"


def test_peaks_and_troughs_of_a_sine() -> None:
    peaks, troughs = scan.rope_peaks(np.sin(np.arange(100) * 2 * np.pi / 20))
    assert peaks.tolist() == [5, 25, 45, 65, 85]
    assert troughs.tolist() == [15, 35, 55, 75, 95]


def test_dividing_out_the_trend_leaves_the_ripples() -> None:
    s = np.arange(1, 401)
    trend = np.exp(1 - 0.7 * np.log(s) + 0.05 * np.log(s) ** 2 - 0.01 * np.log(s) ** 3)
    wave = 1 + 0.2 * np.sin(s)
    np.testing.assert_allclose(ripples(np.stack([trend, 7 * trend])), 1, rtol=1e-8)
    assert np.corrcoef(ripples(trend * wave), wave)[0, 1] > 0.99


def test_rank_correlation_is_spearmans() -> None:
    draw = np.random.default_rng(0)
    many, one = draw.normal(size=(3, 40)), draw.normal(size=40)
    expected = [pd.Series(row).rank().corr(pd.Series(one).rank()) for row in many]
    np.testing.assert_allclose(rank_correlation(many, one), expected)
    assert np.isnan(rank_correlation(np.full((1, 40), 0.5), one)).all(), "a flat curve has no ripples"


def test_a_models_own_frequencies() -> None:
    opened = llama()
    np.testing.assert_allclose(scan.model_frequencies(opened), scan.rope_frequencies(10000.0, 8), rtol=1e-6)
    assert scan.model_frequencies(bert()) is None
    assert WaveformHeads().lacks(opened) is None
    assert WaveformHeads().lacks(bert()) is not None


def test_attention_by_distance_is_the_mean_of_the_dense_map() -> None:
    opened = llama()
    question = WaveformHeads(span=20, seeds=2, every=3)
    found = scan.heads(opened, questions=[question])
    expected = np.zeros((2, 4, 20))
    for prompt in question.prompts(opened):
        ids = prompt.inputs["input_ids"]
        with attend(opened, readings=[Map()]) as run, torch.no_grad():
            opened.model(input_ids=ids)
        weights = run.tree["text"]["map"].isel(sample=0).transpose("layer", "head", "query", "key").values
        rows = range(ids.shape[1] - 19, ids.shape[1], 3)
        for s in range(1, 21):
            expected[..., s - 1] += np.mean([weights[..., i, i - s] for i in rows], axis=0) / 2
    seen = found.data["attention_by_distance"].sel(stream="text").transpose("layer", "head", "lag")
    np.testing.assert_allclose(seen.values, expected, atol=1e-6)
    wave = scan.rope_waveform(scan.model_frequencies(opened), 20)[1:]
    score = found.data["waveform_heads"].sel(stream="text")
    np.testing.assert_allclose(score.values, rank_correlation(ripples(expected), ripples(wave)), atol=0.02)


def rotation_only(key: float) -> scan.Scan:
    """A model whose tokens are all alike: scores are the sum of cos(s theta_j), times `key`."""
    opened = llama(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    with torch.no_grad():
        opened.model.model.embed_tokens.weight.fill_(1.0)
        attention = opened.model.model.layers[0].self_attn
        attention.q_proj.weight.fill_(1 / 32)
        attention.k_proj.weight.fill_(key / 32)
    return scan.heads(opened, questions=[WaveformHeads(span=128, seeds=1)])


def test_a_head_of_nothing_but_rotation_follows_the_waveform() -> None:
    assert rotation_only(1.0).heads["waveform_heads"].item() > 0.5
    assert np.isnan(rotation_only(0.0).heads["waveform_heads"].item()), "uniform attention has no ripples"


def test_another_base_may_be_named() -> None:
    opened = llama()
    found = scan.heads(opened, questions=[WaveformHeads(span=16, seeds=1, base=123.0)])
    wave = scan.rope_waveform(scan.rope_frequencies(123.0, 8), 16)[1:]
    np.testing.assert_allclose(found.data["rope_waveform"].sel(stream="text").values, wave, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: scan.rope_frequencies(1.0, 64), "base"),
        (lambda: scan.rope_frequencies(1e4, 7), "head_dim"),
        (lambda: WaveformHeads(span=4), "span"),
        (lambda: WaveformHeads(span=600).prompts(llama()), "lower span="),
    ],
)
def test_bad_input_is_named(make: object, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        make()  # type: ignore[operator]
