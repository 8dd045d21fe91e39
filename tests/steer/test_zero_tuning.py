"""Choices, calibration and recipes."""

import json
import math

import numpy as np
import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.models import Opened
from tests.scan.models import llama
from tests.steer.test_methods import ACTIVE, IDS, PARTS

EXAMPLES = [steer.Choice("the family was so much pleased with", (" him", " her"), gold=n % 2) for n in range(2)] + [
    steer.Choice("Mr . Bingley had soon", (" a", " the", " no"), gold=2)
]


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


def test_log_probabilities_of_options_are_the_models_own(opened: Opened) -> None:
    for choice in (EXAMPLES[0], steer.Choice("the family was", (" so much", " a"))):
        found = steer.option_logprobs(opened, choice)
        for option, value in zip(choice.options, found, strict=True):
            prompt, whole = (opened.encode(t)["input_ids"][0] for t in (choice.prompt, choice.prompt + option))
            with torch.no_grad():
                logp = opened.model(whole[None]).logits[0].log_softmax(-1)
            wanted = sum(logp[n - 1, whole[n]] for n in range(len(prompt), len(whole)))
            assert float(value) == pytest.approx(float(wanted), abs=1e-4)


def test_accuracy_and_entropy(opened: Opened) -> None:
    right = [int(steer.option_logprobs(opened, e).argmax()) == e.gold for e in EXAMPLES]
    assert steer.accuracy(opened, EXAMPLES) == sum(right) / 3
    p = torch.stack([steer.option_logprobs(opened, EXAMPLES[0]).softmax(-1)]).double()
    assert steer.option_entropy(opened, EXAMPLES[:1]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    gold = [float(steer.option_logprobs(opened, e).log_softmax(-1)[e.gold]) for e in EXAMPLES]
    assert steer.choices.likelihood(opened, EXAMPLES) == pytest.approx(sum(gold) / 3, abs=1e-4)
    with pytest.raises(hw.HeadwiseError, match="gold is known"):
        steer.choices.likelihood(opened, [steer.Choice("a", (" b", " c"))])
    with pytest.raises(hw.HeadwiseError, match="gold is known"):
        steer.accuracy(opened, [steer.Choice("a", (" b", " c"))])


@pytest.mark.parametrize("mode", ["accuracy", "likelihood", "entropy"])
def test_calibration_is_never_worse_than_the_plain_model_on_its_examples(opened: Opened, mode: str) -> None:
    tuned = steer.ZeroTuning().calibrate(opened, EXAMPLES, mode=mode, grid=(0.25, 1.0, 4.0))
    score = tuned.scorer(opened, EXAMPLES, mode)
    assert score(tuned) >= score(steer.ZeroTuning())
    assert {h for _, h in tuned.heads} != set(range(4))  # half of the four head numbers
    assert tuned.gain in (0.25, 1.0, 4.0)


def test_prompts_that_share_a_pass_are_scored_as_alone(opened: Opened) -> None:
    some = [*EXAMPLES, steer.Choice("a man of large", (" fortune", " so much"), gold=0)]
    together = steer.choices.many_logprobs(opened, some)
    for example, found in zip(some, together, strict=True):
        torch.testing.assert_close(found, steer.option_logprobs(opened, example), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["likelihood", "entropy"])
def test_slopes_are_those_of_the_gain(mode: str) -> None:
    opened = llama()
    opened.model.double()
    slopes = steer.ZeroTuning().slopes(opened, EXAMPLES, mode)

    def value(log_gain: float, pair: tuple[int, int]) -> float:
        method = steer.TokenScale(gain=math.exp(log_gain), heads=[pair])
        with steer.apply(opened, method):
            logs = [steer.option_logprobs(opened, e).log_softmax(-1) for e in EXAMPLES]
        if mode == "likelihood":
            return sum(float(p[e.gold]) for p, e in zip(logs, EXAMPLES, strict=True)) / len(EXAMPLES)
        return sum(float((p.exp() * p).sum()) for p in logs) / len(EXAMPLES)

    for pair in ((0, 1), (1, 3)):
        wanted = (value(0.02, pair) - value(-0.02, pair)) / 0.04
        assert float(slopes[pair]) == pytest.approx(wanted, rel=1e-2, abs=1e-5)


def test_heads_by_gradient_are_those_of_the_larger_side(opened: Opened) -> None:
    tuned = steer.ZeroTuning().calibrate(opened, EXAMPLES, per="head", probe="gradient", grid=(0.5, 1.0, 2.0))
    slopes = steer.ZeroTuning().slopes(opened, EXAMPLES).flatten()
    sign = 1 if slopes.clamp(min=0).sum() >= (-slopes).clamp(min=0).sum() else -1
    order = (sign * slopes).argsort(descending=True)[:4]
    assert set(tuned.heads) == {divmod(int(n), 4) for n in order}
    curve = tuned.curve(opened, EXAMPLES, grid=(0.5, 1.0, 2.0))
    assert curve[tuned.gain] == max(curve.values())


def test_leverage_is_the_slope_of_the_entropy_of_rows() -> None:
    opened = llama()
    opened.model.double()
    batch = opened.encode("the family was so much pleased with the house")
    found = steer.first_token_leverage(opened, batch)

    def entropy(log_gain: float) -> np.ndarray:
        edits = steer.TokenScale(gain=math.exp(log_gain)).edits(opened)
        with hw.attend(opened, readings=[hw.Entropy(layers=0)], edits=edits) as run, torch.no_grad():
            opened.model(**batch)
        return run.tree["text"]["entropy"].mean("query").values[0, 0]

    np.testing.assert_allclose(found["entropy_slope"].values[0], (entropy(1e-3) - entropy(-1e-3)) / 2e-3, atol=1e-4)
    with hw.attend(opened, readings=[hw.Mass(("first",))]) as run, torch.no_grad():
        opened.model(**batch)
    np.testing.assert_allclose(found["mass"], run.tree["text"]["mass"].mean("query").values[0, ..., 0], atol=1e-6)


def test_calibration_says_what_it_wants(opened: Opened) -> None:
    for wrong in ({"mode": "luck"}, {"per": "layer"}, {"share": 0.0}, {"probe": "none"}):
        with pytest.raises(hw.HeadwiseError, match=next(iter(wrong))):
            steer.ZeroTuning().calibrate(opened, EXAMPLES, **wrong)
    with pytest.raises(hw.HeadwiseError, match="examples: wanted"):
        steer.ZeroTuning().slopes(opened, [steer.Choice("a", (" b", " c"))])


def test_a_recipe_comes_back_as_it_was(opened: Opened, tmp_path) -> None:
    pattern = hw.scan.heads(opened, texts=["the family is here"], questions=["sinks"]).pattern("sinks")
    methods = (
        steer.TokenScale(gain=2.0, heads=pattern),
        steer.ScaleHeads(heads=((0, 1), (1, 3)), gain=0.5),
        steer.Knockout("span", layers=(0, 1)),
    )
    path = steer.Recipe.of(opened, *methods).save(tmp_path / "recipe.json")
    again = steer.Recipe.load(path)
    again.check(opened)
    assert again.methods == methods
    with pytest.raises(hw.HeadwiseError, match="made for"):
        again.check(llama(num_hidden_layers=3))


@pytest.mark.parametrize("name", ACTIVE)
def test_a_recipe_of_any_method_steers_as_the_method_does(opened: Opened, tmp_path, name: str) -> None:
    found = []
    path = steer.Recipe.of(opened, ACTIVE[name]).save(tmp_path / "recipe.json")
    for methods in ((ACTIVE[name],), steer.Recipe.load(path).methods):
        with steer.apply(opened, *methods, segments=PARTS), torch.no_grad():
            found.append(opened.model(IDS).logits)
    assert torch.equal(*found)


def test_a_recipe_keeps_numbers_of_numpy_and_wants_methods_and_its_tensors(opened: Opened, tmp_path) -> None:
    method = steer.TokenScale(gain=np.float32(2.0), heads=np.argwhere(np.eye(2, 4, 1) > 0))  # type: ignore[arg-type]
    path = steer.Recipe.of(opened, method).save(tmp_path / "recipe.json")
    assert steer.Recipe.load(path).methods == (steer.TokenScale(gain=2.0, heads=((0, 1), (1, 2))),)
    with pytest.raises(hw.HeadwiseError, match="one or more steering methods"):
        steer.Recipe.of(opened)
    given = json.loads(path.read_text())
    for methods, said in (
        ([], "one or more steering methods"),
        ([{"method": "TokenScale", "settings": {"gain": "x"}}], "must be a number; got 'x'"),
        ([{"method": "TokenScale", "settings": {"heads": {"pattern": {}}}}], "damaged"),
    ):
        path.write_text(json.dumps(given | {"methods": methods}))
        with pytest.raises(hw.HeadwiseError, match=said):
            steer.Recipe.load(path)
    path = steer.Recipe.of(opened, ACTIVE["FocusDirections"]).save(tmp_path / "directions.json")
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(hw.HeadwiseError, match="directions is missing"):
        steer.Recipe.load(path)


@pytest.mark.parametrize("damage", ["not json", "{}", "unknown method", "unknown setting"])
def test_a_damaged_recipe_is_refused(opened: Opened, tmp_path, damage: str) -> None:
    path = steer.Recipe.of(opened, steer.TokenScale(gain=2.0)).save(tmp_path / "recipe.json")
    given = json.loads(path.read_text())
    if damage == "unknown method":
        given["methods"][0]["method"] = "os.system"
    if damage == "unknown setting":
        given["methods"][0]["settings"]["colour"] = 1
    path.write_text(damage if damage in ("not json", "{}") else json.dumps(given))
    with pytest.raises(hw.HeadwiseError):
        steer.Recipe.load(path)
    with pytest.raises(hw.HeadwiseError, match="cannot be read"):
        steer.Recipe.load(tmp_path / "none.json")
