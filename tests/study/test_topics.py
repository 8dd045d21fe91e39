"""The topic model's data, its closed form, and its studies on small settings."""

import numpy as np
import torch
from tests.scan.models import bert

from headwise import scan
from headwise.models import open_model
from headwise.study.topic_heads import redealt, topic_attention_real
from headwise.study.topic_model import IGNORED, TopicCorpus, optimal_value, value_contrast
from headwise.study.topics import (
    attention,
    shuffled,
    topic_stages,
    topic_structure,
    topic_transformer,
    topic_value_blocks,
)


def test_documents_are_of_their_topics_and_masked_as_said() -> None:
    corpus = TopicCorpus(batch=400)
    generator = torch.Generator().manual_seed(0)
    batch = corpus(generator)
    ids, labels = batch["input_ids"], batch["labels"]
    chosen = labels != IGNORED
    assert 100 <= ids.shape[1] <= 150
    np.testing.assert_allclose(chosen.float().mean(), 0.15, atol=0.01)
    fates = [(ids == corpus.mask) & chosen, (ids == labels) & chosen]
    np.testing.assert_allclose([x.sum() / chosen.sum() for x in fates], [0.8, 0.1 + 0.1 / 100], atol=0.01)
    assert (ids[~chosen] < corpus.mask).all()
    topics = corpus.labels[corpus.documents(generator)]
    share = torch.nn.functional.one_hot(topics).double().mean(1)
    # The largest share of a Dirichlet of ten 0.1s is far above that of an even mix.
    assert share.max(1).values.mean() > 0.5
    np.testing.assert_allclose(share.mean(0), 0.1, atol=0.05)


def test_the_closed_form_maps_the_mean_input_to_the_shares() -> None:
    corpus = TopicCorpus(topics=4, words=5, batch=1, length=(200_000, 200_000), alpha=1.0)
    batch = corpus(torch.Generator().manual_seed(3))
    seen = torch.bincount(batch["input_ids"][0], minlength=21).double() / 200_000
    true = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])[0]
    share = torch.bincount(true // 5, minlength=4).double() / 200_000
    wanted = torch.cat([share.repeat_interleave(5) / 5, torch.zeros(1)])
    np.testing.assert_allclose(optimal_value(corpus) @ seen, wanted, atol=1e-3)
    assert value_contrast(optimal_value(corpus), corpus.labels) > 0


def test_frozen_queries_and_keys_attend_evenly() -> None:
    model = topic_transformer(0, trained=("v",), loss="squared")
    seen = attention(model, 0)
    for pair in ("same_token", "same_class", "other"):
        length = 1 / seen[pair].item()
        assert 100 <= length <= 150
    ids = torch.arange(50)[None]
    found = scan.class_attention(open_model(model), [{"input_ids": ids}], [ids[0] // 10])
    np.testing.assert_allclose(found["same_class"], 1 / 50, atol=1e-7)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"embedding", "bias", "attention.q_proj.weight", "attention.k_proj.weight"}


def test_shuffles_keep_how_many_words_a_topic_has() -> None:
    labels = TopicCorpus().labels
    again = shuffled(labels, 1)
    assert not torch.equal(labels, again)
    assert torch.equal(labels.sort().values, again.sort().values)
    assert again[-1] == -1
    (dealt,) = redealt([torch.tensor([0, 1, -1, 0, 2])], [torch.tensor([5, 6, -1, 5, 7])], seed=0)
    assert dealt[0] == dealt[3]
    assert dealt[2] == -1
    assert sorted(dealt[[0, 1, 4]].tolist()) == [0, 1, 2]


def test_the_synthetic_studies_measure_what_they_say() -> None:
    blocks = topic_value_blocks(seeds=[0], steps=30)
    (row,) = blocks.measured["seeds"]
    assert row["optimum"] < row["trained"] < row["zero"]
    assert 0 < row["contrast"] < blocks.measured["contrast_optimum"]
    structure = topic_structure(seeds=[0], full_seeds=[0], steps=3)
    assert structure.verdict == "fails", "three steps teach nothing"
    np.testing.assert_allclose(structure.measured["attention_ratio"], 1, atol=0.05)
    stages = topic_stages(seeds=[0], steps=20, each=10)
    (row,) = stages.measured["seeds"]
    assert len(row["value"]) == len(row["weights"]) == 3
    assert row["half_value"] in (10, 20)


def test_a_random_model_knows_no_topics() -> None:
    found = topic_attention_real(models=[bert()], seeds=[0, 1], texts=2)
    (row,) = found.measured.values()
    assert abs(row["median_ratio"] - 1) < 0.2
    assert len(row["median_ratio_shuffled"]) == 2
