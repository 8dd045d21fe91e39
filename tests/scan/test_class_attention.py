"""Attention within and between classes, against dense maps and limits."""

import numpy as np
import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.scan.class_attention import class_attention, embedding_contrast
from tests.scan.models import bert, llama

PAIRS = ("same_token", "same_class", "other")


def eager(opened, ids) -> np.ndarray:
    opened.model.set_attn_implementation("eager")
    with torch.no_grad():
        found = opened.model(input_ids=ids, output_attentions=True).attentions
    opened.model.set_attn_implementation("sdpa")
    return torch.cat(found).double().numpy()


def slow(maps, labels, tokens, causal) -> dict[str, tuple[np.ndarray, int]]:
    total = {pair: [0.0, 0] for pair in PAIRS}
    for i in range(len(labels)):
        for j in range(i if causal else len(labels)):
            if i == j or labels[i] < 0 or labels[j] < 0:
                continue
            pair = "same_token" if tokens[i] == tokens[j] else "same_class" if labels[i] == labels[j] else "other"
            total[pair][0] = total[pair][0] + maps[..., i, j]
            total[pair][1] += 1
    return total


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("by_token", [True, False])
def test_means_equal_those_over_all_pairs_of_dense_maps(make, by_token) -> None:
    opened, generator = make(), torch.Generator().manual_seed(2)
    ids = [torch.randint(5, 20, (1, n), generator=generator) for n in (31, 24)]
    # By token every token has one class; by position a token stands in several.
    labels = [(x[0] % 4) - 1 if by_token else torch.arange(x.shape[1]) // 8 - 1 for x in ids]
    found = class_attention(opened, [{"input_ids": x} for x in ids], labels)
    parts = [slow(eager(opened, x), label.tolist(), x[0].tolist(), make is llama) for x, label in zip(ids, labels)]
    for pair in PAIRS:
        count = sum(part[pair][1] for part in parts)
        np.testing.assert_allclose(found[pair], sum(part[pair][0] for part in parts) / count, atol=1e-6)
        assert (found[f"{pair}_count"] == count).all()


def test_uniform_attention_sees_no_classes() -> None:
    opened = bert()
    with torch.no_grad():
        for layer in opened.model.encoder.layer:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    ids = torch.randint(5, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    found = class_attention(opened, [{"input_ids": ids}], [ids[0] % 3])
    for pair in PAIRS:
        np.testing.assert_allclose(found[pair], 1 / 40, atol=1e-7)


def test_shuffled_labels_give_a_ratio_of_about_one() -> None:
    opened, generator = bert(), torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 105, (1, 150), generator=generator) for _ in range(3)]
    names = torch.randint(0, 5, (105,), generator=generator)
    found = class_attention(opened, [{"input_ids": row} for row in rows], [names[row[0]] for row in rows])
    np.testing.assert_allclose(found["same_class"] / found["other"], 1, atol=0.2)


def test_a_kind_without_pairs_is_nan() -> None:
    ids = torch.arange(5, 15)[None]
    found = class_attention(llama(), [{"input_ids": ids}], [torch.zeros(10, dtype=torch.long)])
    assert found["other"].isnull().all()
    assert found["same_token"].isnull().all()
    assert found["same_class"].notnull().all()


def test_embedding_contrast_of_known_vectors() -> None:
    e = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [9.0, 9.0]])
    found = embedding_contrast(e, torch.tensor([0, 0, 1, -1]))
    assert found == {"same_token": pytest.approx((1 + 2 + 4) / 3), "same_class": 1.0, "other": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([torch.tensor([0, 1])], r"shapes \(2,\) and \(5,\)"),
        ([torch.full((5,), -1)], "two tokens with a class; got 0"),
        ([], "each of the 1 inputs; got 0, 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, said) -> None:
    with pytest.raises(HeadwiseError, match=said):
        class_attention(llama(), [{"input_ids": torch.arange(5)[None]}], labels)
    with pytest.raises(HeadwiseError, match=r"each of the 3 embeddings; got shape \(2,\)"):
        embedding_contrast(torch.ones(3, 2), torch.zeros(2))
