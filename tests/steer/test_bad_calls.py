"""Calls that cannot mean anything: told in a sentence, and none of them runs on for ever."""

from collections.abc import Callable

import pytest
import torch

from headwise import steer
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments, open_model
from tests.models.tiny import llama as wordless
from tests.scan.models import llama
from tests.steer.test_methods import IDS, PARTS

SCALE = steer.TokenScale(gain=2.0)
CASES = [steer.Choice("the family was", (" pleased", " large"), 0)]
DOCUMENTS = steer.FoundInTheMiddle(("a", "b"))
ROWS = torch.randn(3, 2, 4, 8)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


def applied(opened: Opened, segments: object) -> None:
    with steer.apply(opened, SCALE, segments=segments):  # type: ignore[arg-type]
        opened.model(IDS)


def focus(opened: Opened, relevant: tuple[int, int], **options: int) -> None:
    parts = Segments.from_spans({"relevant": relevant, "answer": (10, 12)}, 12)
    steer.FocusDirections().calibrate(opened, [steer.Focus(IDS, parts)], **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda o: applied(o, "span"), "segments= must be Segments.*'span'"),
        (lambda o: applied(o, {"vision": PARTS}), "streams vision; LlamaForCausalLM has text"),
        (lambda o: steer.calibrate(o, "x", CASES), "a method such as"),
        (lambda o: steer.calibrate(o, steer.TokenScale, CASES), "a method such as"),
        (lambda o: steer.calibrate(o.model, SCALE, CASES), "an opened model.*got a LlamaForCausalLM"),
        (lambda o: steer.calibrate(o, SCALE, CASES, grid=["gain"]), "grid: wanted a mapping"),
        (lambda o: steer.calibrate(o, SCALE, CASES, grid={"gain": 2}), "got 'gain': 2"),
        (lambda o: steer.ZeroTuning().calibrate(o, CASES, grid=()), "grid: wanted one or more"),
        (lambda o: steer.ACT().prepare(o, {}), "one prompt"),
        (lambda o: steer.Choice("a", "xy"), "two or more different answers; got 'xy'"),
        (lambda o: steer.option_logprobs(open_model(wordless()), CASES[0]), "choose a decoder-only language model"),
        (lambda o: DOCUMENTS.calibrate(o, "the", ["the family", ""], "was"), "docs: .*none of them empty"),
        (lambda o: DOCUMENTS.calibrate(o, "the", ["the family", "was"], "was", dummy=" "), "dummy: .*got ' '"),
        (lambda o: focus(o, (1, 1)), "segment 'relevant'"),
        (lambda o: focus(o, (1, 3), epochs=0), "epochs= of at least 1.*0"),
        (lambda o: steer.task_embedding(o, []), "prompts: wanted a list"),
        (lambda o: steer.head_rows(o, []), "inputs: wanted a list"),
        (lambda o: steer.head_rows(o, "the family"), "inputs: wanted a list"),
        (lambda o: steer.head_rows(o, ["the family"], position=99), "no token at 99"),
        (lambda o: steer.head_pursuit(o, ROWS, heads=[(9, 0)]), r"heads: .*got \(9, 0\)"),
        (lambda o: steer.head_pursuit(o, ROWS[..., :7]), r"\[row, layer, head, channel\]; got \(3, 2, 4, 7\)"),
        (lambda o: steer.head_pursuit(o, ROWS[:, :1]), "2 layers and 4 heads"),
        (lambda o: steer.concept_tokens(o, []), "a list of one or more words"),
        (lambda o: steer.concept_tokens(open_model(wordless()), ["cat"]), "a model with a tokenizer"),
        (lambda o: steer.choose_buckets(o, n=2, candidates=(-1.0,)), r"candidates= above 0; got \(-1.0,\)"),
    ],
)
def test_it_is_told(opened: Opened, call: Callable, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        call(opened)
