"""Topics of words, labels of tokens, and the question that asks about them."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.scan.class_attention import class_attention
from headwise.scan.needles import haystack
from headwise.scan.topics import (
    TopicAttention,
    bundled_documents,
    label_tokens,
    passages,
    shuffled_texts,
    topic_words,
)
from tests.scan.models import bert, llama

SEA = "The ship sails on waves. A captain steers the ship through storm waves. "
FARM = "The farmer milks cows. Cows graze while the farmer mends fences near cows. "


def test_words_of_two_kinds_of_documents_get_two_topics() -> None:
    words = topic_words([SEA, FARM] * 6, topics=2, share=0.8, seed=0)
    assert words["ship"] == words["waves"] == words["captain"]
    assert words["cows"] == words["farmer"] == words["fences"] != words["ship"]
    assert "the" not in words
    mixed = topic_words([SEA + FARM] * 6 + [SEA, FARM], topics=2, share=1.0, seed=0)
    assert mixed == {}, "no word is certain"


def test_every_piece_of_a_word_has_its_topic() -> None:
    opened = llama()
    text = "Mr. Bennet replied that Bennet had not."
    found = label_tokens(opened, text, {"replied": 3, "bennet": 1})
    pieces = opened.tokenizer.convert_ids_to_tokens(opened.encode(text)["input_ids"][0])
    assert [p for p, t in zip(pieces, found.topics.tolist()) if t == 1] == ["Bennet", "Bennet"]
    assert found.topics[pieces.index("replied")] == 3
    assert sorted(found.words.unique().tolist()) == [-1, 0, 1]


def test_passages_lose_no_word_and_texts_keep_to_their_length() -> None:
    opened, documents = llama(), bundled_documents()
    found = passages(documents, 40)
    assert " ".join(found).split() == " ".join(documents).split()
    assert max(len(piece.split()) for piece in found) <= 60
    texts = shuffled_texts(opened, found, texts=3, length=200, seed=1)
    assert all(len(opened.tokenizer(text)["input_ids"]) <= 200 for text in texts)
    assert texts == shuffled_texts(opened, found, texts=3, length=200, seed=1)
    assert len(set(texts)) == 3


@pytest.mark.parametrize("make", [llama, bert])
def test_the_question_is_class_attention_of_its_own_texts(make) -> None:
    opened = make()
    question = TopicAttention(texts=2, length=200)
    prompts = question.prompts(opened)
    found = scan.heads(opened, questions=[question]).data.sel(stream="text")
    wanted = class_attention(
        opened, [p.inputs for p in prompts], [p.own.topics for p in prompts], [p.own.words for p in prompts]
    )
    np.testing.assert_allclose(found["same_topic"], wanted["same_class"], rtol=1e-5)
    np.testing.assert_allclose(found["other_topic"], wanted["other"], rtol=1e-5)
    np.testing.assert_allclose(found["same_word"], wanted["same_token"], rtol=1e-5)
    np.testing.assert_allclose(found["topic_attention"], wanted["same_class"] / wanted["other"], rtol=1e-5)


def test_a_head_that_looks_for_the_topic_is_found() -> None:
    """Queries and keys of the second head of layer 0 are made one direction a topic."""
    opened = bert()
    question = TopicAttention(documents=(haystack(),), texts=2, length=200)
    with torch.no_grad():
        opened.model.embeddings.LayerNorm = torch.nn.Identity()
        opened.model.embeddings.position_embeddings.weight.zero_()
        opened.model.embeddings.token_type_embeddings.weight.zero_()
        table = opened.model.embeddings.word_embeddings.weight
        table.zero_()
        for prompt in question.prompts(opened):
            for token, topic in zip(prompt.inputs["input_ids"][0], prompt.own.topics):
                if topic >= 0:
                    table[token, topic] = 1
        layer = opened.model.encoder.layer[0].attention.self
        for part in (layer.query, layer.key):
            part.weight.zero_()
            part.bias.zero_()
            part.weight[8:13, :5] = 6 * torch.eye(5)
    found = scan.heads(opened, questions=[question]).data["topic_attention"].sel(stream="text", layer=0)
    assert float(found[1]) > 50
    np.testing.assert_allclose(found[0], 1, atol=0.05)  # texts of two lengths, so not quite 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(HeadwiseError, match="topics=1"):
        TopicAttention(topics=1)
    with pytest.raises(HeadwiseError, match="no word stands in two"):
        topic_words(["one two three"], 2, 0.6, 0)
    with pytest.raises(HeadwiseError, match="got a length of 3"):
        shuffled_texts(llama(), ["a b c d e f"], 1, 3, 0)
    opened = llama()
    opened.tokenizer = None
    assert TopicAttention().lacks(opened) == "text and a fast tokenizer"
