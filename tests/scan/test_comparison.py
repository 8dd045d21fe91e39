"""Two models side by side: aligned by place, with the similarity of their heads; a model is like itself."""

import json

import numpy as np
import pytest

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.studio import render_report
from tests.scan.models import bert, llama

TEXTS = [
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "Mr. Bennet replied that he had not.",
]
ASKED = ["sinks", "positional_heads"]


def test_a_model_is_like_itself() -> None:
    opened = llama()
    found = scan.compare(opened, opened, texts=TEXTS, questions=ASKED)
    table = found.heads
    assert len(table) == 8
    np.testing.assert_allclose(table["similarity"], 1, atol=1e-6)
    np.testing.assert_allclose(table["best_similarity"], 1, atol=1e-6)
    assert (table["sinks_change"] == 0).all()
    assert (table["role"] == table["role_other"]).all()
    assert (found.summary["spearman"].dropna() > 0.999).all()
    np.testing.assert_allclose(np.diag(found.similarity["layers"]), 1, atol=1e-4)
    assert [name.endswith(end) for name, end in zip(found.names, ("(first)", "(second)"))] == [True, True]


def test_a_changed_head_is_the_one_that_changes_most() -> None:
    one, other = llama(), llama()
    site = other.sites[1]
    other.model.model.layers[1].self_attn.q_proj.weight.data[2 * site.head_dim : 3 * site.head_dim] *= 40
    found = scan.compare(one, other, texts=TEXTS, questions=ASKED)
    table = found.heads.set_index(["layer", "head"])
    assert table["similarity"].idxmin() == (1, 2)
    assert table.loc[(0, 0), "similarity"] == pytest.approx(1, abs=1e-6)
    assert table.loc[(0, 3), "best_match"] == "L0.H3"
    moved = table["local_change"].abs()
    assert moved.idxmax() == (1, 2)
    row = found.summary.set_index("column").loc["local"]
    assert row["most_changed"] == "text L1.H2"
    assert row["change"] == pytest.approx(table.loc[(1, 2), "local_change"])


def test_heads_that_only_one_has_stay_and_are_unknown_for_the_other() -> None:
    found = scan.compare(llama(), llama(num_hidden_layers=3), texts=TEXTS[:1], questions=ASKED)
    table = found.heads
    assert len(table) == 12
    first, second = found.names
    assert first != second, "two of one name are told apart by their weights"
    alone = table[table["layer"] == 2]
    assert alone["sinks"].isna().all()
    assert alone["sinks_other"].notna().all()
    assert alone["similarity"].isna().all()
    assert found.similarity["layers"].shape == (2, 3)
    payload = found.payload()
    assert payload["streams"] == [{"name": "text", "layers": [0, 1, 2], "heads": 4}]
    assert payload["matrices"][0]["column_names"] == ["0", "1", "2"]


def test_saved_scans_compare_without_their_models() -> None:
    one = scan.heads(llama(), texts=TEXTS, questions=[*ASKED, "entropy"])
    other = scan.heads(bert(), texts=TEXTS, questions=ASKED)
    found = scan.compare(one, other)
    assert "entropy" not in [c["name"] for c in found.columns]
    assert not found.similarity
    assert found.heads["similarity"].isna().all()
    assert found.payload()["matrices"] == []
    with pytest.raises(HeadwiseError, match="no column in common"):
        scan.compare(scan.heads(llama(), texts=TEXTS, questions=["entropy"]), other)


def test_the_page_has_both_scores_and_their_change() -> None:
    found = scan.compare(llama(), bert(), texts=TEXTS, questions=ASKED)
    payload = json.loads(json.dumps(found.payload(), allow_nan=False))
    names = [q["name"] for q in payload["questions"]]
    assert names[:5] == ["similarity", "best_similarity", "sinks", "sinks_other", "sinks_change"]
    grids = {q["name"]: np.array(q["grid"]["text"], dtype=float) for q in payload["questions"]}
    np.testing.assert_allclose(grids["sinks_change"], grids["sinks_other"] - grids["sinks"], atol=1e-4)
    assert "Layers" in render_report(payload)
    assert found._repr_html_().count("<tr") == 1 + len(found.columns)
