"""The studies of head pursuit on a small random model and on planted vectors."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama

from headwise.models import Opened
from headwise.study import concept_heads as study
from headwise.study import concept_steering as steering
from headwise.study.concepts import Concept, concepts
from headwise.study.pursuit import pursuit_support

SMALL = Concept(
    words=("family", "house", "wife", "girls"),
    cues=("man", "daughter", "fortune", "mother", "sister", "large"),
    asking=("the {} was so", "a {} of the"),
    telling=("he had a {} with him", "the {} is here"),
)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama(num_hidden_layers=3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Concept(("man", "sister", "mother"), SMALL.words, SMALL.asking, SMALL.telling)
    for module in (study, steering):
        monkeypatch.setattr(module, "concepts", lambda: {"one": SMALL, "other": other})


@pytest.mark.parametrize("name", concepts())
def test_halves_share_no_prompt_and_sentences_say_where_the_word_is(name: str) -> None:
    concept = concepts()[name]
    one, two = concept.halves(0)
    assert not set(one) & set(two)
    assert len(one) + len(two) == len(concept.cues) * len(concept.asking)
    for text, (start, stop) in concept.sentences(0, 12):
        assert text[start:stop] in concept.words
        assert not any(text.startswith(prompt) for prompt in (*one, *two))


@pytest.mark.usefixtures("small")
def test_specialisation_is_measured(opened: Opened) -> None:
    found = study.concept_heads_specialise(opened, top=2)
    for row in found.measured["concepts"].values():
        assert 0 < row["explained_median"] <= row["explained_top"] <= 1
        assert len(row["words_of_top"]) == 6
    assert set(found.measured["shared_top_heads_of_halves"]) == {"one", "other"}


@pytest.mark.usefixtures("small")
def test_steering_is_measured(opened: Opened) -> None:
    found = steering.concept_heads_steer(opened, seeds=[0], counts=(1, 2), sentences=5, continued=3)
    assert set(found.measured["tests"]) == {f"top{n}_against_{label}" for n in (1, 2) for label in ("others", "random")}
    assert {"top1", "top2_zero", "lens2", "random2_0"} <= set(found.measured["change"])


def test_scores_are_of_the_concepts_tokens_and_the_others(opened: Opened) -> None:
    sentences = SMALL.sentences(0, 3)
    found = steering.Sentences.of(opened, sentences).scores(opened, [])
    for (text, (start, _)), row in zip(sentences, found, strict=True):
        ids = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = opened.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [float(logp[n, ids[n + 1]]) for n in range(len(ids) - 1)]
        place = len(text[:start].split()) - 1
        assert row[0] == pytest.approx(each[place], abs=1e-4)
        assert row[1] == pytest.approx(np.mean(each[:place] + each[place + 1 :]), abs=1e-4)


def test_continuations_come_from_their_seed(opened: Opened) -> None:
    one = steering.continuation(opened, [], 0, 4)
    assert torch.equal(one, steering.continuation(opened, [], 0, 4))
    assert not torch.equal(one, steering.continuation(opened, [], 1, 4))
    assert one.shape == (12, 4)
    assert steering.share(torch.tensor([[1, 2], [3, 1]]), [1]) == 0.5


def test_overlap() -> None:
    assert study.jaccard([1, 2, 3], [2, 3, 4]) == 0.5


def test_planted_atoms_are_recovered() -> None:
    found = pursuit_support(seeds=range(3), noises=(0.0, 3.0))
    assert found.measured["pursuit_random"][0] == 1
    assert found.measured["pursuit_random"][1] < 1
    assert found.measured["lens_grouped"][0] < 1, "atoms like a strong one come before a weak one"
