"""The scan's studies run end to end on small models, and their parts measure what they say."""

import pandas as pd
import pytest

from headwise import scan
from headwise.scan.retrieval import answer, prefill
from headwise.study.induction import induction_ablation, same_layers
from headwise.study.retrieval import recalls, spearman
from headwise.study.sinks import sink_inputs, sink_values
from tests.scan.models import circuit, llama


def test_silencing_the_induction_circuit_undoes_it() -> None:
    found = induction_ablation(circuit(positions=110), seeds=[0], sequences=1)
    (row,) = found.measured["seeds"]
    assert row["heads"] == 1
    assert row["rise_all"] == row["rise_top5"] > 0.5
    assert row["rise_random_all"] == 0, "the layer has no other head to draw"
    assert found.verdict == "holds"


def test_random_heads_come_from_the_same_layers_and_are_others() -> None:
    opened = llama()
    drawn = same_layers(opened, [(0, 1), (1, 0), (1, 3)], [(0, 1), (1, 0), (1, 3)], seed=0)
    assert [layer for layer, _ in drawn] == [0, 1, 1]
    assert not set(drawn) & {(0, 1), (1, 0), (1, 3)}


def test_sink_studies_measure_every_condition() -> None:
    opened = llama()
    found = sink_inputs(opened, sequences=4, length=16)
    assert {"text", "random", "repeated", "text_with_bos"} <= set(found.measured)
    assert found.verdict == "fails", "a random model has no sinks"
    assert 0 <= sink_values(opened, sequences=2, length=16).measured["sink_rate_0.3"] <= 1


def test_knocking_out_no_head_changes_nothing() -> None:
    opened = llama()
    question = scan.RetrievalHeads(contexts=(60,), depths=1, needles=scan.NEEDLES[:1], max_new=3)
    (hidden,) = question.instances(opened)
    start, stop = hidden.answer
    assert opened.decode(hidden.ids[0, start:stop]) == hidden.needle.answer
    clean = answer(opened, hidden, prefill(opened, hidden), 3)
    again = answer(opened, hidden, prefill(opened, hidden), 3, [])
    assert clean[:2] == again[:2]
    assert recalls(opened, question, {"none": [], "some": [(0, 1)]})["none"] == clean[0]


def test_spearman_is_the_correlation_of_ranks() -> None:
    one = pd.Series([0.0, 0.0, 1.0, 2.0])
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
