"""The census of later sinks, and what a head's loss says of them."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.attention import Map, Reweight, attend
from headwise.errors import HeadwiseError
from headwise.models import Segments
from headwise.scan.question import Prompt
from headwise.scan.sink_census import SinkCensus
from headwise.scan.sink_tokens import calibration
from tests.scan.models import bert, llama
from tests.scan.test_sinks import uniform, values


def sharp(n: int = 24) -> np.ndarray:
    """A head that rests on token 5 and one that rests on token 0."""
    later, first = np.zeros((n, n)), np.zeros((n, n))
    first[:, 0] = 1
    later[:5, 0], later[5:, 5] = 1, 1
    return np.stack([later, first])


def test_a_later_sink_is_counted_and_the_first_token_is_not() -> None:
    found = SinkCensus().reduce(values(sharp()), Prompt({}))
    assert found["number"][0].values.tolist() == [1, 0]
    np.testing.assert_allclose(found["mass"][0], [19 / 24, 0])
    assert found["any"][0].values.tolist() == [1, 0]


def test_tokens_that_few_queries_see_are_left_out_unless_wanted() -> None:
    identity = np.eye(10)[None]
    assert SinkCensus().reduce(values(identity), Prompt({}))["number"].item() == 2, "those that 8 or 9 queries see"
    assert SinkCensus(min_queries=1).reduce(values(identity), Prompt({}))["number"].item() == 9


def test_the_relative_rule_asks_for_many_times_uniform_attention() -> None:
    assert SinkCensus(rule="relative").reduce(values(uniform(60)[None]), Prompt({}))["number"].item() == 0
    weak = uniform(60)
    weak[30:, 20] += 0.2
    weak /= weak.sum(1, keepdims=True)
    assert SinkCensus(rule="relative").reduce(values(weak[None]), Prompt({}))["number"].item() == 1
    assert SinkCensus(threshold=0.15).reduce(values(weak[None]), Prompt({}))["number"].item() == 0


def test_the_table_of_tokens_agrees_with_the_maps() -> None:
    opened = llama()
    ids = torch.arange(4, 34)[None]
    asked = SinkCensus(threshold=0.06)
    table = scan.later_sink_tokens(opened, inputs=[{"input_ids": ids}], question=asked)
    with attend(opened, readings=[Map()]) as run, torch.no_grad():
        opened.model(input_ids=ids)
    weights = run.tree["text"]["map"].values[0]
    mean = np.stack([weights[:, :, k:, k].mean(-1) for k in range(30)], -1)
    expected = {(a, b, k) for a, b, k in np.argwhere(mean > 0.06).tolist() if 0 < k <= 30 - 8}
    assert {(r.layer, r.head, r.position) for r in table.itertuples()} == expected
    assert table["mass"].is_monotonic_decreasing
    row = table.iloc[0]
    assert row["mass"] == pytest.approx(mean[row["layer"], row["head"], row["position"]], abs=1e-6)
    count = scan.heads(opened, inputs=[{"input_ids": ids}], questions=[asked]).heads["sink_census"]
    assert count.sum() == len(table)


def test_calibrated_rows_are_the_papers_and_sum_to_one() -> None:
    opened, beta, places = llama(), 0.4, [3, 9]
    ids = torch.arange(4, 24)[None]
    segments = Segments.from_spans({"later sinks": [(3, 4), (9, 10)]}, 20, rest="others")
    rule = Reweight(groups=("others", "later sinks"), rule=calibration(beta), heads=[(0, 1)])
    with attend(opened, readings=[Map(layers=0, heads=1)]) as run, torch.no_grad():
        opened.model(input_ids=ids)
    a = run.tree["text"]["map"].values[0, 0, 0].astype(float)
    expected = a.copy()
    for i in range(20):  # the official loop
        s = a[i, places].sum()
        for k in range(20):
            expected[i, k] = beta * a[i, k] if k in places else a[i, k] * (1 + (1 - beta) * s / (1 - s))
    with attend(opened, readings=[Map(layers=0, heads=1)], edits=[rule], segments=segments) as run, torch.no_grad():
        opened.model(input_ids=ids)
    found = run.tree["text"]["map"].values[0, 0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def test_beta_one_changes_nothing_and_smaller_ones_do() -> None:
    opened, asked = llama(), SinkCensus(threshold=0.06)
    inputs = [{"input_ids": torch.randint(4, 60, (1, 30), generator=torch.Generator().manual_seed(n))} for n in (0, 1)]
    heads = [(n, h) for n in range(2) for h in range(4)]
    same = scan.sink_effects(opened, heads, inputs=inputs, question=asked, beta=1.0)
    np.testing.assert_allclose(same["change"].dropna(), 0, atol=1e-5)
    less = scan.sink_effects(opened, heads, inputs=inputs, question=asked, beta=0.0)
    assert (less["change"].abs() > 1e-4).any()
    assert set(less["kind"]) <= {"good", "bad", "neutral"}


def test_a_head_without_later_sinks_is_neutral_and_a_control_moves_elsewhere() -> None:
    opened = llama()
    inputs = [{"input_ids": torch.arange(4, 34)[None]}]
    none = scan.sink_effects(opened, [(0, 0)], inputs=inputs, question=SinkCensus(threshold=0.99))
    assert none.loc[0, "sinks"] == 0
    assert none.loc[0, "kind"] == "neutral"
    asked, seen = SinkCensus(threshold=0.06), []

    def instead(share: np.ndarray, count: int) -> list[int]:
        seen.append(count)
        return [0]

    scan.sink_effects(opened, [(0, 0)], inputs=inputs, question=asked, instead=instead)
    assert seen == [
        len(scan.later_sink_tokens(opened, inputs=inputs, question=asked).query("layer == 0 and head == 0"))
    ]


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"rule": "none"}, {"alpha": 1}, {"min_queries": 0}])
def test_bad_options_name_themselves(wrong: dict) -> None:
    with pytest.raises(HeadwiseError, match=next(iter(wrong))):
        SinkCensus(**wrong)


def test_bad_input_is_refused() -> None:
    with pytest.raises(HeadwiseError, match="texts"):
        scan.later_sink_tokens(llama())
    with pytest.raises(HeadwiseError, match="beta"):
        scan.sink_effects(llama(), [(0, 0)], texts=["the cat"], beta=2)
    with pytest.raises(HeadwiseError, match="language model"):
        scan.sink_effects(bert(), [(0, 0)], texts=["the cat"])
