"""Settings of the wrong kind or range: told in a sentence that names them, whatever the method."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from headwise import steer
from headwise.errors import HeadwiseError
from headwise.steer.settings import fits
from tests.scan.models import llama
from tests.steer.test_methods import ACTIVE, IDS, PARTS

ABSURD = ("abc", None, -1, math.nan, math.inf, (), [0.5], [1, 2], [(0, 1, 2)], 5, True, {}, torch.ones(3), ("a", "b"))
METHODS = {name: method for name, method in ACTIVE.items() if name != "AttentionBuckets"}


@pytest.mark.parametrize("name", METHODS)
def test_absurd_settings_are_told_and_never_a_traceback(name: str) -> None:
    told = []
    for setting in (field.name for field in fields(METHODS[name])):
        for value in ABSURD:
            try:
                replace(METHODS[name], **{setting: value})
            except HeadwiseError as error:
                told.append((setting, str(error)))
    assert len(told) > 10
    assert all(setting in words for setting, words in told)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: steer.TokenScale(gain="2"), r"TokenScale\(gain=.*a number; got '2'"),
        (lambda: steer.TokenScale(heads=3), r"heads=.*\(layer, head\) pairs, a head pattern, or None for all; got 3"),
        (lambda: steer.TokenScale(heads=[1, 2]), r"pairs.*got \[1, 2\]"),
        (lambda: steer.ScaleHeads(gain=True), "a number; got True"),
        (lambda: steer.ForceAttention(targets=1), "a list, each a whole number; got 1"),
        (lambda: steer.ForceAttention((1, 2), weights=(math.inf, 1.0)), "weights="),
        (lambda: steer.ACT(rule="both"), '"absolute" or "relative"; got \'both\''),
        (lambda: steer.ACT(sinks=((0, 1, ()),)), "positions from 0 on"),
        (lambda: steer.ConceptHeads(((0, 1),), alpha=math.nan), "alpha=.*finite"),
        (lambda: steer.FocusDirections(torch.ones(2, 4, 8), alpha=math.inf), "alpha=.*finite"),
        (lambda: steer.FlattenBasin(("a", "b"), (0.1, math.nan)), "profile="),
        (lambda: steer.FlattenBasin(("a", "b"), (0.1, 0.2), strength=math.nan), "strength="),
        (lambda: steer.FoundInTheMiddle(("a", "b"), (math.nan, 1.0)), "relevance=.*finite"),
        (lambda: steer.FoundInTheMiddle(("a", "b"), torch.ones(2, 2)), r"\[layer, head, document\]; got .*\(2, 2\)"),
        (lambda: steer.Knockout("a", layers=[]), "layers="),
        (lambda: steer.SoftInjection(torch.ones(4, 8), torch.ones(2, 4)), r"a tensor \[layer, head, dim\]"),
    ],
)
def test_a_setting_of_the_wrong_kind_or_range(make: Callable, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        make()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (steer.TokenScale(gain=2.0, heads=[(0, 9)]), r"layers 0 to 1 with heads 0 to 3; got \(0, 9\)"),
        (steer.TokenScale(gain=2.0, heads=[(-1, 0)]), r"got \(-1, 0\)"),
        (steer.FocusDirections(torch.ones(1, 4, 8)), r"directions=.*2 layers and 4 heads.*\(1, 4, 8\)"),
        (steer.FocusDirections(torch.full((2, 4, 8), math.nan)), "directions=.*finite"),
        (steer.SoftInjection(torch.ones(1, 4, 8), torch.ones(1, 4)), "embedding=.*2 layers and 4 heads"),
        (steer.SoftInjection(torch.ones(2, 4, 8), 3 * torch.ones(2, 4)), "alpha=.*from 0 to 1; got 3.0 to 3.0"),
        (steer.FoundInTheMiddle(("span", "other"), torch.ones(2, 3, 2)), "relevance=.*2 layers and 4 heads"),
        (steer.FoundInTheMiddle(("span", "other"), (0.0, 1.0), first_layer=2), "first_layer=.*0 to 1; got 2"),
    ],
)
def test_what_does_not_fit_the_model(method: steer.Method, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words), steer.apply(llama(), method, segments=PARTS):
        pass


def test_numbers_and_heads_of_numpy_are_taken() -> None:
    opened = llama()
    ours = steer.TokenScale(gain=2.0, heads=((0, 1), (1, 2)))
    theirs = steer.TokenScale(gain=np.float32(2.0), heads=np.argwhere(np.eye(2, 4, 1) > 0))  # type: ignore[arg-type]
    found = []
    for method in (ours, theirs):
        with steer.apply(opened, method), torch.no_grad():
            found.append(opened.model(IDS).logits)
    assert torch.equal(*found)
    assert fits(((0, 1),), steer.method.Heads)


def test_a_method_made_inside_a_function_may_name_what_only_stands_there() -> None:
    class Kind:
        pass

    @dataclass(frozen=True)
    class Own(steer.Method):
        kind: "Kind"
        gain: "float" = 1.0

    assert Own(Kind()).name == "own"  # type: ignore[arg-type]
