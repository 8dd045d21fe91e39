"""Choices, calibration and recipes."""

import json

import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.models import Opened
from tests.scan.models import llama

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
    with pytest.raises(hw.HeadwiseError, match="gold is known"):
        steer.accuracy(opened, [steer.Choice("a", (" b", " c"))])


@pytest.mark.parametrize("mode", ["labels", "entropy"])
def test_calibration_is_never_worse_than_the_plain_model_on_its_examples(opened: Opened, mode: str) -> None:
    tuned = steer.ZeroTuning().calibrate(opened, EXAMPLES, mode=mode, grid=(0.25, 1.0, 4.0))
    score = tuned.scorer(opened, EXAMPLES, mode)
    assert score(tuned) >= score(steer.ZeroTuning())
    assert {h for _, h in tuned.heads} != set(range(4))  # half of the four head numbers
    assert tuned.gain in (0.25, 1.0, 4.0)


def test_calibration_says_what_it_wants(opened: Opened) -> None:
    for wrong in ({"mode": "luck"}, {"per": "layer"}, {"share": 0.0}):
        with pytest.raises(hw.HeadwiseError, match=next(iter(wrong))):
            steer.ZeroTuning().calibrate(opened, EXAMPLES, **wrong)


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
