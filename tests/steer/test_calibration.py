"""One entry that calibrates every method, and the examples it takes."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.models import Opened
from headwise.scan.needles import haystack
from headwise.steer.calibration import answer_logprob, wanted
from headwise.steer.choices import shared_tokens
from headwise.study.evaluate import evaluate, perplexity
from headwise.study.tasks import documents
from tests.scan.models import bert, llama

PROMPT = "the family was so much pleased with"
EXAMPLES = [
    steer.Example(PROMPT, " him", spans={"relevant": (4, 10)}),
    steer.Example("Mr . Bingley had soon made", " her", (" her", " the"), {"relevant": (5, 12)}),
    steer.Example("the house was", " so much", spans={"relevant": (4, 9)}),
]


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


def test_the_score_is_the_log_probability_of_all_tokens_of_the_answer(opened: Opened) -> None:
    total = 0.0
    for example in EXAMPLES:
        ids, whole = (opened.encode(t)["input_ids"][0] for t in (example.prompt, example.prompt + example.answer))
        parts = hw.Segments.from_characters(example.prompt + example.answer, example.spans, opened.tokenizer)
        with steer.apply(opened, steer.Emphasis("relevant", alpha=0.1), segments=parts), torch.no_grad():
            logp = opened.model(whole[None]).logits[0].log_softmax(-1)
        total += sum(float(logp[n - 1, whole[n]]) for n in range(len(ids), len(whole)))
    found = answer_logprob(opened, EXAMPLES, steer.Emphasis("relevant", alpha=0.1))
    assert found == pytest.approx(total / 3, abs=1e-4)


def test_the_best_setting_of_a_grid_is_kept(opened: Opened) -> None:
    method = steer.Emphasis("relevant")
    grid = {"alpha": (1.0, 0.3, 0.01), "heads": (None, ((0, 1),))}
    found = steer.calibrate(opened, method, EXAMPLES, grid=grid)
    tried = [steer.Emphasis("relevant", a, h) for a in grid["alpha"] for h in grid["heads"]]
    assert found == max(tried, key=lambda m: answer_logprob(opened, EXAMPLES, m))
    worst = steer.calibrate(opened, method, EXAMPLES, grid=grid, score=lambda *a: -answer_logprob(*a))
    assert worst == min(tried, key=lambda m: answer_logprob(opened, EXAMPLES, m))


def test_without_a_grid_the_methods_own_space_is_searched(opened: Opened) -> None:
    found = steer.calibrate(opened, steer.Emphasis("relevant"), EXAMPLES)
    tried = [steer.Emphasis("relevant", a) for a in steer.Emphasis.space["alpha"]]
    assert found == max(tried, key=lambda m: answer_logprob(opened, EXAMPLES, m))
    flat = steer.calibrate(opened, steer.TokenScale(), EXAMPLES, score=lambda *_: 0.0)
    assert flat.gain == 1.0  # where all are equal, nothing is changed


def test_the_spaces_of_methods_are_theirs_and_begin_with_nothing() -> None:
    for kind in steer.METHODS:
        assert set(kind.space) <= {f.name for f in fields(kind)}
        assert all(values[0] in (0.0, 1.0) for values in kind.space.values())


def test_methods_that_learn_are_given_their_own_form(opened: Opened) -> None:
    choices = [
        steer.Choice(e.prompt, e.options or (" him", " her", " so much"), g) for e, g in zip(EXAMPLES, (0, 0, 2))
    ]
    options = {"grid": (0.5, 1.0, 2.0)}
    assert wanted(steer.ZeroTuning(), opened, EXAMPLES) == (choices,)
    own = steer.ZeroTuning().calibrate(opened, choices, per="index")
    assert steer.calibrate(opened, steer.ZeroTuning(), EXAMPLES, per="index") == own
    gain = steer.calibrate(opened, steer.ZeroTuning(), choices, grid={"gain": options["grid"]}).gain
    assert gain in options["grid"]
    focus = steer.calibrate(opened, steer.FocusDirections(), EXAMPLES, epochs=1)
    assert focus.directions.shape == (2, 4, 8)
    soft = steer.calibrate(opened, steer.SoftInjection(), EXAMPLES, steps=2)
    assert soft.embedding.shape == (2, 4, 8)
    assert len(steer.calibrate(opened, steer.ConceptHeads(), EXAMPLES[:2], count=3).heads) == 3
    scaled = steer.calibrate(opened, steer.PositionalHiddenScaling(1, layers=(0, 1)), EXAMPLES, channels=(1, 2))
    assert scaled.channel in (1, 2)


def test_few_shot_prompts_of_soft_injection_end_with_an_open_question(opened: Opened) -> None:
    many = [steer.Example(f"the house {n}", f" {n}") for n in range(8)]
    shots, train, valid = wanted(steer.SoftInjection(), opened, many)
    assert (len(shots), len(train), len(valid)) == (6, 6, 2)
    assert shots[0] == "\n\n".join([*(f"the house {n} {n}" for n in (3, 4, 5, 6)), "the house 2"])
    assert not {p for p, _ in train} & {p for p, _ in valid}


@pytest.mark.parametrize(
    "wrong,said",
    [
        (lambda o: steer.calibrate(o, steer.Knockout("span"), EXAMPLES), "Knockout has nothing to calibrate"),
        (lambda o: steer.calibrate(o, steer.Emphasis(), []), "one or more; got none"),
        (lambda o: steer.calibrate(o, steer.Emphasis(), ["a"]), "wanted Examples"),
        (lambda o: steer.calibrate(o, steer.Emphasis(), EXAMPLES, grid={"beta": (1,)}), "grid: wanted values"),
        (lambda o: steer.calibrate(o, steer.Emphasis(), EXAMPLES, grid={"alpha": ()}), "grid: wanted values"),
        (lambda o: steer.calibrate(o, steer.Emphasis(), EXAMPLES, steps=3), "steps goes to a method's own"),
        (lambda o: steer.calibrate(o, steer.FoundInTheMiddle(("a", "b")), EXAMPLES), "one prompt and its documents"),
        (lambda o: steer.calibrate(o, steer.SoftInjection(), EXAMPLES[:2]), "three or more"),
        (lambda o: steer.calibrate(o, steer.FocusDirections(), [steer.Example("a", " b")]), 'segment "relevant"'),
        (lambda o: steer.Example("a", ""), "a prompt and an answer"),
        (lambda o: steer.Example("a", " b", (" c",)), r"Example\(options"),
        (lambda o: steer.Example("a", " b", " b"), r"Example\(options.*a list"),
        (lambda o: steer.Example(1, 2), "a prompt and an answer; got 1 and 2"),
        (lambda o: steer.calibrate(o, steer.ZeroTuning(), EXAMPLES, colour=1), "takes mode, per.*; got colour"),
        (lambda o: steer.calibrate(o, steer.TokenScale(), [steer.Example(PROMPT, " ")]), "adds no token"),
        (lambda o: steer.calibrate(bert(), steer.TokenScale(), EXAMPLES), "choose a decoder-only language model"),
        (lambda o: steer.option_logprobs(bert(), steer.Choice("a", (" b", " c"))), "choose a decoder-only"),
    ],
)
def test_mistakes_are_told(opened: Opened, wrong, said: str) -> None:
    with pytest.raises(hw.HeadwiseError, match=said):
        wrong(opened)


def test_a_method_that_looks_at_the_prompt_is_made_ready_for_each(opened: Opened) -> None:
    method = steer.ACT(threshold=0.01, min_queries=1, heads=((0, 1), (1, 0)))
    found = steer.calibrate(opened, method, EXAMPLES, grid={"beta": (0.9, 0.0)})
    total = 0.0
    for example in EXAMPLES:
        ready = replace(found).prepare(opened, opened.encode(example.prompt))
        total += answer_logprob(opened, [example], ready)
    assert answer_logprob(opened, EXAMPLES, found) == pytest.approx(total / 3, abs=1e-5)
    table = evaluate(opened, documents(seed=0, count=2), {"act": [method]})
    assert (table.pivot(index="example", columns="setting", values="logp").diff(axis=1)["plain"].abs() > 1e-6).all()
    assert perplexity(opened, haystack(), [method], 32, 2) != perplexity(opened, haystack(), (), 32, 2)


def test_an_answer_that_changes_the_first_token_of_the_prompt_is_told() -> None:
    ids = torch.arange(3, 7)
    with pytest.raises(hw.HeadwiseError, match="changes its first token; begin with a longer prompt"):
        shared_tokens(ids[:1], ids[1:2], "bout")
    assert shared_tokens(ids[:2], torch.tensor([3, 9, 8]), "x") == 1


def test_examples_are_read_from_lines(tmp_path) -> None:
    path = tmp_path / "examples.jsonl"
    rows = [
        {"prompt": PROMPT, "answer": " him", "segments": {"relevant": "family", "other": [0, 3]}},
        {"prompt": "the house was", "answer": " a", "options": [" a", " the"]},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    one, two = steer.read_examples(path)
    assert one == steer.Example(PROMPT, " him", spans={"relevant": (4, 10), "other": (0, 3)})
    assert two.options == (" a", " the")
    for text, said in (
        ("", "holds none"),
        ("{", "line 1"),
        ('{"prompt": "a"}', "line 1 .*'answer'"),
        ('{"prompt": "a", "answer": "b", "options": "b"}', "line 1 .*a list"),
        ('{"prompt": 1, "answer": 2}', "line 1 .*a prompt and an answer"),
        ('{"prompt": "a", "answer": "b", "segments": {"x": "q"}}', "does not stand in the prompt"),
    ):
        path.write_text(text)
        with pytest.raises(hw.HeadwiseError, match=said):
            steer.read_examples(path)
    with pytest.raises(hw.HeadwiseError, match="cannot be read"):
        steer.read_examples(tmp_path / "none.jsonl")
    assert math.isfinite(answer_logprob(llama(), [one], steer.TokenScale()))
