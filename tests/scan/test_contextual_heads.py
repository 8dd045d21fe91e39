"""Contextual heads: masses of the answer's tokens on documents that are known, against the whole matrix."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from tests.scan.models import bert, llama

SMALL = scan.ContextualHeads(documents=4, prompts_asked=4)


def test_the_scores_are_those_of_the_whole_matrix() -> None:
    opened = llama()
    table = scan.heads(opened, questions=[SMALL]).heads
    slow = []
    for number, prompt in enumerate(SMALL.prompts(opened)):
        assert prompt.own[0] == number, "every place is asked for"
        with attend(opened, readings=[Map()]) as run, torch.no_grad():
            opened.model(**prompt.inputs)
        rows = run.tree["text"]["map"].isel(sample=0).transpose("layer", "head", "query", "key").values
        segments, answer = prompt.segments["text"], rows[:, :, prompt.own[1] :]
        each = [answer[..., segments.mask(f"document {n + 1}").numpy()].sum(-1).mean(-1) for n in range(4)]
        others = [m for n, m in enumerate(each) if n != prompt.own[0]]
        slow.append([each[prompt.own[0]], np.sum(others, 0), np.max(others, 0), answer[..., :2].sum(-1).mean(-1)])
        said = opened.decode(prompt.inputs["input_ids"][0, prompt.own[1] :])
        assert said == opened.decode(opened.tokenizer(f"{SMALL.shelves.shelf(number).answer}.")["input_ids"])
    wanted = np.mean(slow, 0).reshape(4, -1)
    for column, expected in zip(SMALL.columns(), wanted, strict=True):
        np.testing.assert_allclose(table[column.name], expected, rtol=1e-4, atol=1e-6)


def test_what_it_needs_and_what_is_wrong() -> None:
    assert "language model" in SMALL.lacks(bert())
    with pytest.raises(HeadwiseError, match="slots"):
        scan.ContextualHeads(documents=2)
    with pytest.raises(HeadwiseError, match="prompts_asked"):
        scan.ContextualHeads(prompts_asked=0)
