"""Under `attend`, every family computes what it computes alone, and its readings are those of its eager weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise.attention import force_path

from .compare import READINGS, TOLERANCE, agree, own_model
from .family import Batch, Call, Family, batch_of, build, furthest, recorded, tensors
from .table import DISPATCHING

pytestmark = pytest.mark.filterwarnings("ignore:.*attention layers were not read")


@dataclass
class Case:
    """One family: the model on its own back end, what it computes, and what the same weights do under eager."""

    family: Family
    model: nn.Module
    batch: Batch
    plain: list[Tensor]
    eager: list[Tensor]
    calls: list[Call]

    @property
    def mask(self) -> Tensor | None:
        return self.batch.get("attention_mask")

    def run(self) -> list[Tensor]:
        with torch.no_grad():
            return tensors(self.model(**self.batch))


@pytest.fixture(scope="module", params=DISPATCHING, ids=lambda family: family.id)
def case(request: pytest.FixtureRequest) -> Case:
    eager, model = build(request.param), own_model(request.param)
    batch = batch_of(request.param, model)
    with torch.no_grad(), recorded(eager) as calls:
        whole = tensors(eager(**batch))
    found = Case(request.param, model, batch, [], whole, calls)
    found.plain = found.run()
    return found


def configs(model: nn.Module) -> list[tuple[int, str]]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return sorted((key, repr(vars(config))) for key, config in found.items())


def test_readings_equal_eager_and_outputs_do_not_change(case: Case):
    before = configs(case.model)
    with hw.attend(case.model, readings=READINGS) as run:
        watched = case.run()
    assert furthest(watched, case.plain, case.mask) <= TOLERANCE
    assert furthest(watched, case.eager, case.mask) <= TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(case.plain, case.run(), strict=True)), "the model is not as it was"
    assert configs(case.model) == before
    agree(run, case.calls, case.batch)
    assert {call.name for call in case.calls} <= {row.site for row in run.report if row.status == "reached"}
    for row in run.report:
        by_hand = any(part in row.site for part in case.family.refused)
        assert row.status == ("refused" if by_hand else "reached"), row
        assert row.reason


def test_the_streaming_path_agrees(case: Case):
    with force_path("stream"), hw.attend(case.model, readings=READINGS) as run:
        watched = case.run()
    assert furthest(watched, case.eager, case.mask) <= TOLERANCE
    agree(run, case.calls, case.batch)


def test_a_silenced_head_changes_the_output_and_a_gain_of_one_does_not(case: Case):
    with hw.attend(case.model) as run:
        case.run()
    reached = [row for row in run.report if row.status == "reached"]
    for stream in {row.stream for row in reached}:
        layer = min(row.layer for row in reached if row.stream == stream)
        for gain, changes in ((1.0, False), (0.0, True)):
            with hw.attend(case.model, edits=[hw.HeadGain(layer=layer, heads=[1], gain=gain, stream=stream)]):
                edited = case.run()
            gap = furthest(edited, case.plain, case.mask)
            assert (gap > 1e-4) == changes, f"{stream}:{layer} gain {gain} moved the output by {gap:.2e}"
