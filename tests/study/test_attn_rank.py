"""The study of orders: prompts reordered by what each order says, and the finding of a model."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from tests.scan.models import bert, llama

from headwise.attention import Map, attend
from headwise.study import attn_rank as studied
from headwise.study import tasks


def test_orders_are_what_their_names_say() -> None:
    relevance = np.array([0.1, 0.9, 0.5, 0.7])
    profile = np.array([0.2, 0.1, 0.3, 0.4])
    assert studied.order("descending", relevance, profile) == [1, 3, 2, 0]
    assert studied.order("ascending", relevance, profile) == [0, 2, 3, 1]
    assert studied.order("both ends", relevance, profile) == [1, 2, 0, 3]
    assert studied.order("attn_rank", relevance, profile) == [2, 0, 3, 1]


def test_a_reordered_prompt_asks_the_same_of_the_same_documents() -> None:
    [example] = tasks.documents(0, 1)
    items = [3, 1, 0, 2, 7, 6, 5, 4]
    other = studied.reorder(example, items)
    texts = [example.prompt[slice(*example.spans[name])] for name in studied.NAMES]
    assert [other.prompt[slice(*other.spans[name])] for name in studied.NAMES] == [texts[n] for n in items]
    assert other.place == items.index(example.place)
    assert other.prompt.endswith(example.prompt[slice(*example.spans["question"])])
    assert len(other.prompt) == len(example.prompt)
    assert studied.reorder(example, range(8)) == example


def test_the_profile_is_the_mean_weight_of_a_documents_token() -> None:
    opened = llama()
    [example] = tasks.documents(0, 1)
    found = studied.place_profiles(opened, [example])
    segments = example.segments(opened)
    asking = (segments.mask("question") | segments.mask("last")).flatten()
    with attend(opened, [Map()]) as run:
        opened.model(**opened.encode(example.prompt))
    maps = run.tree["text"]["map"].isel(sample=0).transpose("layer", "head", "query", "key").values
    third = maps[:, :, asking.numpy()][..., segments.mask("document 3").flatten().numpy()]
    np.testing.assert_allclose(found[:, 2], third.mean((1, 2, 3)), rtol=1e-4)


def test_the_study_runs_on_a_model() -> None:
    found = studied.attn_rank(llama(), bert(), seeds=(0,), count=3, calibration=2)
    assert set(found.measured["rise_over"]) == {"random", *studied.FIXED}
    assert len(found.measured["profile"]) == 8
    assert found.measured["perplexity"]["plain"] != found.measured["perplexity"]["flattened"]


@pytest.mark.parametrize(("edge", "verdict"), [(1.0, "holds"), (-1.0, "fails")])
def test_the_verdict_follows_the_answers(monkeypatch, edge: float, verdict: str) -> None:
    """Answers that are easier from the last places, and a profile that says so or the opposite."""

    def evaluate(opened, examples, settings):
        names = ["plain", *settings]
        rows = [
            {"setting": s, "example": n, "place": e.place, "logp": 0.1 * e.place, "right": 1.0}
            for n, e in enumerate(examples)
            for s in names
        ]
        return pd.DataFrame(rows)

    profile = xr.DataArray(np.exp(edge * np.arange(8.0))[None], dims=("layer", "slot"), coords={"layer": [0]})
    monkeypatch.setattr(studied, "evaluate", evaluate)
    monkeypatch.setattr(studied, "place_profiles", lambda opened, examples: profile)
    monkeypatch.setattr(studied, "after_items", lambda opened, method=None: 1.0)
    monkeypatch.setattr(studied, "cosines", lambda judge, example: np.eye(8)[example.place])
    found = studied.attn_rank(llama(), bert())
    assert found.verdict == verdict
