"""The study of soft injection on a small random model."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.word_pairs import Relation
from headwise.steer import SoftInjection
from headwise.study import task_embeddings as study

WORDS = "house man family girls fortune wife daughter neighbourhood mother sister".split()


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped pairs are words the small model's tokenizer does not know."""
    pairs = tuple(zip(WORDS, WORDS[::-1], strict=True))
    monkeypatch.setattr(study, "relation", lambda name: Relation(name, name, pairs))


def test_parts_share_no_pair_and_shots_come_from_the_training_part(opened: Opened) -> None:
    task = study.Task.draw(opened, "plural", 0, valid=2, test=3)
    parts = (*task.train, *task.valid, *task.test)
    assert len(set(parts)) == len(parts) >= 9
    [prompt] = task.shots([task.train[0][0]], 3, 0)
    assert prompt.count("A:") == 4
    assert prompt.endswith(f"Q: {task.train[0][0]}\nA:")
    assert f"Q: {task.train[0][0]}\n" not in prompt[: prompt.rindex("Q:")], "its own answer is not shown"
    assert not any(f"Q: {x}\n" in prompt for x, _ in (*task.valid, *task.test))
    with pytest.raises(HeadwiseError, match="with an answer of one token"):
        study.Task.draw(opened, "plural", 0, valid=2, test=8)


def test_everything_is_measured(opened: Opened) -> None:
    found = study.soft_injection_accuracy(
        opened, seeds=[0], names=("plural", "capital"), prompts=3, steps=4, batch=2, valid=2, test=3
    )
    assert {"zero_shot", "ten_shot", "soft_injection", "function_vector", "shuffled_0", "all_1"} <= set(
        found.measured["accuracy"]
    )
    matrix = np.array(found.measured["transfer"]["alpha_of_row_on_column"])
    assert np.diag(matrix).mean() == pytest.approx(found.measured["accuracy"]["soft_injection"])
    assert found.measured["test_pairs"] == 6
    assert found.measured["tokens_a_prompt"]["zero_shot"] < found.measured["tokens_a_prompt"]["ten_shot"]


def test_no_injection_is_the_plain_model(opened: Opened) -> None:
    texts = ["the family was", "a man"]
    found = study.said(opened, texts, None)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            wanted = opened.model(**opened.encode(text)).logits[0, -1]
        torch.testing.assert_close(row, wanted, atol=1e-4, rtol=1e-4)


def test_placebos_keep_the_alphas_but_not_their_heads() -> None:
    alpha = torch.rand(3, 4)
    found = study.placebos(SoftInjection(torch.zeros(3, 4, 8), alpha), 0)
    assert torch.equal(found["shuffled_0"].alpha.flatten().sort().values, alpha.flatten().sort().values)
    assert not torch.equal(found["shuffled_0"].alpha, found["shuffled_1"].alpha)
    assert set(found["mask_0"].alpha.unique().tolist()) <= {0.0, 1.0}
    assert found["all_0.5"].alpha.eq(0.5).all()
