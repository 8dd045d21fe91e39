"""Relation heads, surface patterns and probes: exact cases, a slow reference, and end to end on tiny models."""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr

from headwise import scan
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.scan.grammar import Arc, Sentence, read_conllu, sentences
from headwise.scan.probing import (
    MODES,
    AttentionProbe,
    DistanceProbe,
    Maps,
    attachment,
    candidates,
    train_probe,
    word_maps,
)
from headwise.scan.question import Prompt
from headwise.scan.relations import RELATIONS, RelationHeads, offset_accuracy, predictions, prompt
from headwise.scan.surface import SurfacePatterns
from headwise.scan.units import Units
from tests.scan.models import bert, llama

WORDS = tuple("a b c d e f".split())
NEXT = Sentence(WORDS, tuple(Arc("next", n, n + 1) for n in range(5)))


def plain(count: int) -> Units:
    return Units(torch.arange(count), count)


def test_a_head_that_looks_one_ahead_finds_what_is_one_ahead() -> None:
    ahead = torch.eye(6).roll(1, 1)
    values = xr.Dataset({"map": (("sample", "layer", "head", "query", "key"), ahead[None, None, None].numpy())})
    question = RelationHeads(corpus=(NEXT,), relations=("next",))
    found = question.reduce(values, Prompt({}, own=[(NEXT, plain(6))]))
    assert found["hits"].sel(relation="next", direction="from").item() == 1
    assert found["hits"].sel(relation="next", direction="to").item() == 0
    assert found["hits_count"].sel(relation="next", direction="to").item() == 5
    assert offset_accuracy([NEXT], ["next"]).sel(offset=1).item() == 1
    assert question.score(found)["relation_heads"].item() == 0, "no better than the offset"


def test_predictions_take_the_best_other_word_and_none_where_nothing_is_seen() -> None:
    causal = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0.2, 0.5, 0.3]])
    found = predictions(causal, plain(3))
    np.testing.assert_array_equal(found[0], [-1, 0, 1])  # from: the word itself does not count
    np.testing.assert_array_equal(found[1], [1, 2, -1])  # to: nothing looks at the last word


def test_special_tokens_are_dropped_and_pieces_put_together() -> None:
    units = Units(torch.tensor([-1, 0, 1, 1, -1]), 2)
    weights = torch.full((5, 5), 0.05)
    weights[:, 0] = 0.8
    weights[1, 2:4] = torch.tensor([0.05, 0.06])
    np.testing.assert_array_equal(predictions(weights, units), [[1, 0], [1, 0]])


def test_a_possessor_is_judged_by_its_s() -> None:
    sentence = Sentence(("the", "king", "'s", "old", "dog"), (Arc("poss", 1, 4), Arc("det", 0, 1)))
    assert sentence.source(sentence.arcs[0]) == 2
    assert sentence.source(sentence.arcs[1]) == 0
    assert offset_accuracy([sentence], ["poss"]).idxmax("offset").item() == 2


@pytest.mark.parametrize("make", [llama, bert])
def test_the_question_equals_a_loop_over_words_and_sentences(make: object) -> None:
    opened = make()
    corpus = tuple(sentences(5, seed=3))
    relations = ("det", "nsubj")
    found = scan.heads(opened, questions=[RelationHeads(corpus=corpus, relations=relations)])
    counts = dict.fromkeys(relations, 0)
    hits = {r: np.zeros((2, 2, 4)) for r in relations}
    for sentence in corpus:
        batch = opened.encode(sentence.text)
        with attend(opened, readings=[Map()]) as run, torch.no_grad():
            opened.model(**batch)
        maps = run.tree["text"]["map"].isel(sample=0).transpose("layer", "head", "query", "key").values
        places = opened.tokenizer(sentence.text, return_offsets_mapping=True)["offset_mapping"]
        of = [[t for t, (a, b) in enumerate(places) if a < stop and b > start] for start, stop in sentence.spans]
        for arc in sentence.arcs:
            if arc.relation not in relations:
                continue
            counts[arc.relation] += 1
            i, others = sentence.source(arc), [j for j in range(len(of)) if j != sentence.source(arc)]
            for layer, head in np.ndindex(2, 4):
                a = maps[layer, head].astype(float)
                to = [a[of[i]][:, of[j]].sum(1).mean() for j in others]
                by = [a[of[j]][:, of[i]].sum(1).mean() for j in others]
                for direction, values in enumerate((to, by)):
                    right = max(values) > 0 and others[int(np.argmax(values))] == arc.head
                    hits[arc.relation][direction, layer, head] += right
    stored = found.data["relation_accuracy"].sel(stream="text").transpose("relation", "direction", "layer", "head")
    for place, relation in enumerate(relations):
        np.testing.assert_allclose(stored[place], hits[relation] / counts[relation])
        np.testing.assert_allclose(
            found.data[f"relation_{relation}"].sel(stream="text"), (hits[relation] / counts[relation]).max(0)
        )


def test_heads_are_chosen_on_one_part_and_scored_on_another() -> None:
    opened = bert()
    table = scan.relation_heads(opened, sentences(12, seed=0), sentences(12, seed=1))
    assert list(table["relation"]) == list(RELATIONS)
    again = scan.relation_heads(opened, sentences(12, seed=0), sentences(12, seed=0))
    np.testing.assert_allclose(again["train"], again["accuracy"])
    np.testing.assert_allclose(again["train"], table["train"])
    assert (table["train"] >= table["all_heads"].min()).all()


def test_the_grammar_is_the_same_for_a_seed_and_its_arcs_are_right() -> None:
    made = sentences(200, seed=0)
    assert made == sentences(200, seed=0) != sentences(200, seed=1)
    assert len({s.text for s in made}) == 200
    for sentence in made:
        words = sentence.words
        assert [text for (a, b) in sentence.spans if (text := sentence.text[a:b])] == list(words)
        for arc in sentence.arcs:
            if arc.relation == "auxpass":
                assert words[arc.dependent] == "was"
            if arc.relation == "dobj":
                assert arc.head < arc.dependent
            if arc.relation in ("det", "amod", "poss", "nsubj"):
                assert arc.head > arc.dependent
        dependents = [arc.dependent for arc in sentence.arcs]
        assert len(set(dependents)) == len(dependents), "every word has at most one head"
        assert not any(a == "a" and b[0] in "aeiou" for a, b in pairwise(words))
    best = offset_accuracy(made).max("offset")
    assert (best < 0.85).all(), "no relation has one distance"


def test_conllu_is_read() -> None:
    rows = ["1\tThe\t_\t_\t_\t_\t2\tdet", "2\tdog\t_\t_\t_\t_\t3\tnsubj", "2.1\tx\t_\t_\t_\t_\t2\tdep"]
    rows += ["3\tran\t_\t_\t_\t_\t0\troot", "4\t.\t_\t_\t_\t_\t3\tpunct"]
    (found,) = read_conllu("# text = The dog ran.\n" + "\n".join(rows) + "\n")
    assert found == Sentence(("The", "dog", "ran", "."), (Arc("det", 0, 1), Arc("nsubj", 1, 2)))
    with pytest.raises(HeadwiseError, match="8 columns"):
        read_conllu("1 The dog")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RelationHeads(sentences=0), "sentences"),
        (lambda: RelationHeads(relations=("iobj",)), "iobj"),
        (lambda: Sentence(("a",), (Arc("det", 0, 1),)), "does not fit"),
        (lambda: prompt(bert(), [Sentence(("truth",) * 70, ())]), "64 tokens"),
        (lambda: train_probe(grid(), "syntax"), "mode"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        call()  # type: ignore[operator]


def test_models_without_a_text_tokenizer_are_left_out() -> None:
    opened = llama()
    opened.tokenizer = None
    assert RelationHeads().lacks(opened) == "a model of text with a fast tokenizer"
    assert RelationHeads().lacks(bert()) is None


def grid(sentences: int = 40, words: int = 8, heads: int = 5, seed: int = 0) -> Maps:
    """Random maps; the gold head of a word is where head 2 looks most, or what looks at it most in head 4."""
    generator = torch.Generator().manual_seed(seed)
    weights = (3 * torch.randn(sentences, heads, words, words, generator=generator)).softmax(-1)
    weights[:, :, range(words), range(words)] = 0
    gold = weights[:, 2].argmax(-1)
    real = torch.ones(sentences, words, dtype=torch.bool)
    return Maps(weights, torch.randn(sentences, words, 6, generator=generator), real, gold)


def test_a_probe_finds_the_one_head_that_knows() -> None:
    data = grid()
    probe = train_probe(data, "attention", steps=250)
    assert attachment(probe, grid(seed=1)) > 0.85
    assert int(probe.fixed.detach().abs().sum(0).argmax()) == 2
    assert int(probe.fixed[:, 2].abs().argmax()) == 1, "a_ji: the dependent j looks at its head i"
    chance = attachment(train_probe(data, "words+distance", steps=60), grid(seed=1))
    assert chance < 0.4


def test_probe_scores_equal_their_formula() -> None:
    data, generator = grid(2, 4, 3), torch.Generator().manual_seed(1)
    probe = AttentionProbe(3, 6, "attention+words")
    with torch.no_grad():
        for p in probe.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    found = probe(data)[1].detach()
    v, a = data.vectors[1], data.weights[1]
    for i, j in np.ndindex(4, 4):
        w, u = (probe.fixed[n] + v[i] @ probe.by_head[n] + v[j] @ probe.by_dependent[n] for n in (0, 1))
        torch.testing.assert_close(found[j, i], (w * a[:, i, j]).sum() + (u * a[:, j, i]).sum(), rtol=1e-4, atol=1e-5)
    blocked = candidates(probe, data).isinf()
    assert blocked[0].equal(torch.eye(4, dtype=torch.bool))


def test_the_words_probe_tells_left_from_right() -> None:
    data = grid(words=5)
    right = (torch.arange(5) + 1) % 5
    shifted = Maps(data.weights, data.vectors, data.real, right.expand(len(data), -1).clone())
    probe = train_probe(shifted, "words+distance", steps=100)
    assert isinstance(probe, DistanceProbe)
    assert attachment(probe, shifted) > 0.9


def test_probes_are_the_same_for_a_seed() -> None:
    first, second = (train_probe(grid(), "words+distance", steps=3, seed=1) for _ in range(2))
    torch.testing.assert_close(first.out.weight, second.out.weight)
    assert len(MODES) == 3


def test_word_maps_hold_the_models_maps_in_order() -> None:
    opened, corpus = bert(), sentences(3, seed=1)
    data = word_maps(opened, corpus)
    longest = max(len(s.words) for s in corpus)
    assert data.weights.shape == (3, 8, longest, longest)
    for n, sentence in enumerate(corpus):
        count = len(sentence.words)
        assert data.real[n].sum() == count
        assert data.weights[n, :, count:].abs().sum() == 0
        own = opened.tokenizer(sentence.text)["input_ids"]
        if len(own) == count:  # no word is split: rows are those of the model
            torch.testing.assert_close(data.weights[n, :, :count].sum(-1), torch.ones(8, count))
        for arc in sentence.arcs:
            assert data.head[n, arc.dependent] == arc.head


def test_surface_patterns_of_an_encoder() -> None:
    opened = bert()
    opened.tokenizer = deepcopy(opened.tokenizer)  # it is shared by all tests
    opened.tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    text = "<s> It is a truth. </s> must be in want, </s>"
    found = scan.heads(opened, texts=[text], questions=[SurfacePatterns()]).data.sel(stream="text")
    ids = torch.tensor(opened.encode(text)["input_ids"][0].tolist())
    with attend(opened, readings=[Map()]) as run, torch.no_grad():
        opened.model(**opened.encode(text))
    maps = run.tree["text"]["map"].isel(sample=0).transpose("layer", "head", "query", "key").values
    stops = np.isin(ids, opened.tokenizer.convert_tokens_to_ids([".", ","]))
    sep, cls = (ids == 1).numpy(), (ids == 0).numpy()
    assert (sep.sum(), cls.sum(), stops.sum()) == (2, 1, 2)
    np.testing.assert_allclose(found["cls"], maps[..., cls].sum(-1).mean(-1), atol=1e-5)
    np.testing.assert_allclose(found["sep"], maps[..., sep].sum(-1).mean(-1), atol=1e-5)
    np.testing.assert_allclose(found["punctuation"], maps[..., stops].sum(-1).mean(-1), atol=1e-5)
    np.testing.assert_allclose(found["sep_to_sep"], maps[..., sep, :][..., sep].sum(-1).mean(-1), atol=1e-5)
    np.testing.assert_allclose(found["other_to_sep"], maps[..., ~sep, :][..., sep].sum(-1).mean(-1), atol=1e-5)
    row = maps[..., 0, :]
    np.testing.assert_allclose(found["cls_entropy"], -(row * np.log(row)).sum(-1), atol=1e-5)
    assert "[CLS]" in SurfacePatterns().lacks(llama())
    with pytest.raises(HeadwiseError, match="as the tokenizer adds them"):
        scan.heads(opened, texts=["in want"], questions=[SurfacePatterns()])
