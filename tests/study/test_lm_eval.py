"""lm-eval's harness around a steered model: a stand-in for the package sees the steered model, and only inside."""

import sys
from types import ModuleType

import pytest
import torch
from tests.scan.models import llama

import headwise as hw
from headwise import steer
from headwise.study import lm_eval

IDS = torch.arange(3, 12)[None]


@pytest.fixture
def harness(monkeypatch) -> ModuleType:
    """The part of lm-eval's Python API that is used: each "task" is answered by the model's logits."""

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def simple_evaluate(model, tasks, **options):
        with torch.no_grad():
            return {"results": {task: model.model(IDS).logits for task in tasks}, "options": options}

    package, models, huggingface = (ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))
    package.simple_evaluate, huggingface.HFLM = simple_evaluate, HFLM
    for module in (package, models, huggingface):
        module.__spec__ = object()
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def test_every_task_is_answered_by_the_steered_model(harness: ModuleType) -> None:
    opened = llama()
    method = steer.TokenScale(gain=3.0)
    with torch.no_grad():
        plain = opened.model(IDS).logits
        with steer.apply(opened, method):
            steered = opened.model(IDS).logits
    found = lm_eval.evaluate(opened, ["one", "two"], [method], limit=5)
    assert torch.equal(found["results"]["one"], steered)
    assert found["options"] == {"limit": 5}
    assert torch.equal(lm_eval.evaluate(opened, ["one"])["results"]["one"], plain)
    assert (plain - steered).abs().max() > 1e-4


def test_without_the_package_its_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("headwise.extras.find_spec", lambda name: None)
    with pytest.raises(hw.HeadwiseError, match=r"headwise\[lm-eval\]"):
        lm_eval.evaluate(llama(), ["one"])
    with pytest.raises(hw.HeadwiseError, match="tasks"):
        lm_eval.evaluate(llama(), [])
