"""The studies of dual, slim, triadic and label attention and of context broadcasting, small; their tasks' rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from headwise.models import open_model
from headwise.study.swap_context import attention_density, context_broadcast_entropy
from headwise.study.swap_dual import GAMES, dual_attention_language, dual_attention_relations, played
from headwise.study.swap_labels import LABELS, Phrases, dominance, label_attention_tags, label_head_roles
from headwise.study.swap_slim import ShuffledImages, slim_projection_costs, slim_projections
from headwise.study.swap_triadic import one_by_one, triadic_cost, triadic_learning


def test_games_are_answered_by_their_rules():
    objects = torch.arange(12.0)[:, None]
    for name, game in GAMES.items():
        batch = played(game, 64, objects, seed=0)
        for shown, label in zip(batch["x"][..., 0].int().tolist(), batch["labels"].tolist(), strict=True):
            if name == "same":
                right = shown[0] == shown[1]
            elif name == "all different":
                right = len(set(shown)) == 4
            elif name == "between":
                right = shown[0] == shown[2] != shown[1]
            else:
                right = (shown[0] == shown[2]) == (shown[3] == shown[5])
                assert not set(shown[:3]) & set(shown[3:])
            assert right == bool(label)
        assert 0.3 < batch["labels"].float().mean() < 0.7


def test_words_are_tagged_by_their_phrase():
    task = Phrases(length=10, rows=8)
    batch = task(torch.Generator().manual_seed(0))
    for words, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        turned = words[-1] == task.vocabulary - 1
        kind = None
        for word, label in zip(words[:-1], labels[:-1], strict=True):
            kind = word // 2 if word < 2 * LABELS else kind
            assert label == (LABELS - 1 - kind if turned else kind)
        assert labels[-1] == -100


def test_dominance_of_one_head_each_is_one():
    label = torch.arange(LABELS).repeat(5)
    assert dominance(label, label) == 1
    assert dominance(label, label.roll(1)) == 1
    assert dominance(torch.zeros_like(label), label) == 1
    assert dominance(torch.arange(len(label)) // LABELS % 2, label) < 1


def test_patches_and_pixels_are_one_picture():
    picture = torch.arange(64.0).view(1, 8, 8)
    patches = picture.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
    assert torch.equal(one_by_one(patches).view(8, 8), picture[0])


def test_shuffles_keep_the_patches():
    plain, once, each = (ShuffledImages(order) for order in ("as it is", "shuffled once", "shuffled each time"))
    batches = [next(iter(task.held_out()))["x"] for task in (plain, once, each)]
    assert torch.equal(batches[1], batches[0][:, once.once])
    assert torch.equal(batches[2].sort(1).values, batches[0].sort(1).values)
    assert not torch.equal(batches[2], batches[0])


@pytest.mark.parametrize(
    "measure,key",
    [
        (lambda: dual_attention_relations(seeds=(0,), samples=(50,), steps=2), "mean_by_seed"),
        (lambda: dual_attention_language(seeds=(0,), steps=1), "bits_per_character"),
        (lambda: slim_projections(seeds=(0,), steps=2), "gain_of_super"),
        (lambda: slim_projection_costs(dim=32, heads=4, tokens=8, rounds=1), "flops_counted"),
        (lambda: triadic_learning(seeds=(0,), steps=20, marks=(1, 2, 20)), "accuracy"),
        (lambda: label_attention_tags(seeds=(0,), steps=2), "accuracy"),
        (lambda: label_head_roles(seeds=(0,), steps=2), "mean"),
        (lambda: context_broadcast_entropy(seeds=(0,), steps=2, layers=1, dim=12), "normalised_entropy_by_layer"),
    ],
)
def test_studies_run(measure, key):
    finding = measure()
    assert finding.measured[key]
    assert finding.reason.endswith(".")


def test_costs_are_those_that_pytorch_counts():
    finding = slim_projection_costs(dim=32, heads=4, tokens=8, rounds=1)
    assert finding.measured["flops_counted"] == finding.measured["flops"]
    grown = triadic_cost(tokens=(16, 64, 256)).measured["flops_beside_projections"]
    assert grown["triadic"][0] == grown["triadic"][-1]
    assert grown["attention"][-1] == 256 * grown["attention"][0]


def test_density_of_a_small_image_model():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    opened = open_model(transformers.ViTModel(config).eval())
    finding = attention_density(opened, crops=2)
    assert finding.verdict == "holds"  # random weights look at everything
    assert np.all(np.array(finding.measured["density_by_layer"]) > 0.9)
