"""Compiled models under attend: they run as written inside, and compiled again after it."""

import pytest
import torch
from transformers import CompileConfig

import headwise as hw
from headwise import steer
from tests.scan.models import llama

IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
METHODS = {
    "bias": steer.TokenScale(gain=8.0),
    "gain": steer.ScaleHeads(gain=0.2),
    "hooks": steer.AttentionBuckets((1.0, 3.0)),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_everywhere() -> CompileConfig:
    """What generate() does by itself on a GPU, here without a code generator."""
    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_generate_with_a_static_cache_is_steered_where_it_would_be_compiled(method: steer.Method) -> None:
    opened = llama()
    asked = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, cache_implementation="static")
    with steer.apply(opened, method):
        expected = opened.model.generate(IDS, **asked)
        found = opened.model.generate(IDS, compile_config=compiled_everywhere(), **asked)
    assert torch.equal(found, expected)


def test_a_compiled_model_is_read_and_edited_and_compiled_again_after_it() -> None:
    opened, seen = llama(), []

    def backend(graph, inputs):
        def run(*args):
            seen.append(1)
            return graph(*args)

        return run

    plain = opened.model(IDS).logits
    edits = [hw.HeadGain(0.2)]
    with hw.attend(opened, edits=edits), torch.no_grad():
        expected = opened.model(IDS).logits
    opened.model.compile(backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(opened.model(IDS).logits, plain)
        before = len(seen)
        assert before
        with hw.attend(opened, [hw.Entropy()], edits=edits) as run:
            torch.testing.assert_close(opened.model(IDS).logits, expected)
        assert len(seen) == before
        assert "entropy" in run.tree["text"]
        torch.testing.assert_close(opened.model(IDS).logits, plain)
    assert len(seen) > before
