"""The studies of relation heads, of similarity and of alignment, end to end on tiny models."""

import numpy as np
import pytest
import torch
import xarray as xr
from tests.scan.models import bert, llama

from headwise import scan
from headwise.models import open_model
from headwise.scan.grammar import Arc, Sentence
from headwise.study.alignment import (
    alignment_grows_with_training,
    book_sentences,
    growing,
    intermediate_layers_align,
    pictures_and_captions,
    renumbered,
    simple_facts,
)
from headwise.study.relations import attention_probe_ladder, bert_heads_by_layer, best_offset, passages, relation_heads
from headwise.study.scenes import COLOURS, covers, scenes
from headwise.study.similarity import drift, layers_drift_apart, rotated_neurons, sounds, spaces_not_neurons
from headwise.study.untrained import untrained


def tiny_vit():
    from transformers import BitImageProcessorPil, ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    side = {"height": 32, "width": 32}
    return open_model(model, processor=BitImageProcessorPil(size=side, crop_size=side, do_center_crop=False))


def tiny_whisper():
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "num_mel_bins": 8}
    heads = {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **special, max_source_positions=50)).eval()
    return open_model(model, processor=WhisperFeatureExtractor(feature_size=8, chunk_length=1))


def test_an_untrained_model_has_the_shape_and_other_weights() -> None:
    opened = llama()
    fresh, same, other = untrained(opened, 1), untrained(opened, 1), untrained(opened, 2)
    weights = [m.model.state_dict()["lm_head.weight"] for m in (opened, fresh, same, other)]
    assert len({w.shape for w in weights}) == 1
    assert weights[1].equal(weights[2])
    assert not weights[1].equal(weights[0])
    assert not weights[1].equal(weights[3])
    assert fresh.name == f"{opened.name}, untrained"
    assert fresh.tokenizer is opened.tokenizer


def test_random_heads_have_no_behaviours() -> None:
    found = bert_heads_by_layer(bert(), texts=2, words=20, draws=50)
    assert found.verdict == "fails", "a random model has no head for the next token"
    assert set(found.measured["heads"]) == {"next", "previous", "separators", "broad"}


def test_random_heads_lose_to_offsets() -> None:
    found = relation_heads([bert()], seeds=[0], count=24)
    assert found.verdict == "fails"
    rows = found.measured["BertModel"]
    assert set(rows) == {"det", "amod", "poss", "nsubj", "dobj", "pobj", "auxpass"}
    assert all(row["accuracy"] <= 1 for row in rows.values())
    assert "not for" in found.reason


def test_the_probe_ladder_has_every_rung() -> None:
    found = attention_probe_ladder(bert(), seeds=[0], train=24, test=8, steps=5)
    (row,) = found.measured["seeds"]
    assert set(row) == {"attention", "attention+words", "words+distance", "attention, untrained", "offset"}


def test_the_best_offset_is_chosen_in_training() -> None:
    words = ("a", "b", "c", "d")
    right = Sentence(words, (Arc("x", 0, 1), Arc("x", 1, 2)))
    left = Sentence(words, (Arc("x", 1, 0), Arc("x", 2, 3)))
    assert best_offset([right], [left]) == 0.5


def test_similarity_studies_measure_every_grain() -> None:
    found = spaces_not_neurons(bert(), llama(), words=20, texts=10)
    assert {"maxcorr", "linreg", "svcca", "lincka_debiased"} < set(found.measured)
    turned = rotated_neurons(bert(), words=20, texts=20, seeds=[0])
    assert turned.measured["lincka"] == pytest.approx(1)
    assert turned.measured["linreg"] == pytest.approx(1)
    assert turned.measured["maxcorr"] < 0.95


def test_layers_of_a_speech_model_and_a_text_model_are_compared() -> None:
    found = layers_drift_apart(tiny_whisper(), texts=[bert()], seconds=0.5)
    assert set(found.measured) == {"WhisperForConditionalGeneration", "BertModel"}
    assert all(-1 <= m["rank_correlation"] <= 1 for m in found.measured.values() if m["rank_correlation"] is not None)


def test_a_sounds_padding_is_no_part_of_a_comparison() -> None:
    opened, half = tiny_whisper(), sounds(0.5, 0)[:2]
    assert scan.layer_features(opened, half, "token").shape == (3, 2 * 25, 32), "50 frames are one second"
    alike = scan.head_similarity(opened, opened, half, "js", queries="all")
    np.testing.assert_allclose(np.diag(alike.values.reshape(6, 6)), 1, atol=1e-6)
    assert alike.min() >= 1 - np.log(2)


def test_layers_that_drift_apart_are_told() -> None:
    layers = np.arange(6)
    far = np.abs(layers[:, None] - layers)
    found = drift(xr.DataArray(1 - far / 10, dims=("layer_a", "layer_b")))
    assert found["rank_correlation"] == pytest.approx(-1)
    assert found["nearest_is_neighbour"] == 1
    assert drift(xr.DataArray(far / 10 + 0.1, dims=("layer_a", "layer_b")))["rank_correlation"] == pytest.approx(1)


def test_sounds_are_finite_and_the_same_for_a_seed() -> None:
    first, second = sounds(0.2, 0), sounds(0.2, 0)
    assert len(first) == 9
    assert all(np.isfinite(s).all() and s.dtype == np.float32 and len(s) == 3200 for s in first)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_alignment_studies_measure_what_they_say() -> None:
    found = intermediate_layers_align(llama(), bert(), sentences=24, draws=5)
    assert len(found.measured["curve"]) == 2
    assert {"cka_mean", "mknn_mean", "cka_last", "mknn_last"} == set(found.measured["beside"])
    grown = alignment_grows_with_training(llama(), bert(), seeds=[0], steps=10, sentences=48)
    assert list(grown.measured["steps"]) == ["0", "1", "3", "10"]
    seen = pictures_and_captions(tiny_vit(), bert(), count=30, seeds=[0], draws=9)
    assert 0 <= seen.measured["trained"] <= 1
    assert seen.measured["chance"] == pytest.approx(7 / 29)


def test_renumbered_tokens_keep_their_order_and_training_their_marks() -> None:
    opened = llama()
    texts = ["It is a truth", "a truth is"]
    ids = renumbered(opened, texts)
    assert [len(i) for i in ids] == [4, 3]
    assert ids[1].tolist() == [ids[0][2], ids[0][3], ids[0][1]]
    made = list(growing(ids[0].repeat(5), ids[1:], [0, 2], 0))
    assert [step for step, _ in made] == [0, 2]
    assert made[0][1].model.config.vocab_size == 4


def test_sentences_of_the_book_and_what_is_known_of_them() -> None:
    texts = book_sentences()
    assert len(texts) > 100
    assert all(len(t.split()) >= 5 for t in texts)
    facts = simple_facts(texts)
    assert facts.shape == (len(texts), 3)
    assert float(facts[0, 0].exp()) == pytest.approx(len(texts[0].split()))
    assert len(passages(3, 10)) == 3


def test_scenes_show_what_they_say() -> None:
    pictures, captions = scenes(40, size=48, seed=1)
    assert len(set(captions)) == 40
    for picture, caption in zip(pictures, captions, strict=True):
        _, _, colour, _, _, _, ground, _ = caption.split()
        seen = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
        assert seen == {COLOURS[colour], COLOURS[ground]}
    areas = {shape: covers(shape, 0.5, 0.5, 0.4, 200).mean() for shape in ("circle", "ring", "square", "cross")}
    assert areas["circle"] == pytest.approx(np.pi * 0.16, abs=0.005)
    assert areas["ring"] == pytest.approx(np.pi * 0.16 * (1 - 0.36), abs=0.005)
    assert areas["square"] == pytest.approx((2 * 0.85 * 0.4) ** 2, abs=0.01)
    triangle = covers("triangle", 0.5, 0.5, 0.4, 200)
    assert triangle[:60].sum() < triangle[100:160].sum()
    assert torch.tensor(pictures[0]).shape == (48, 48, 3)
