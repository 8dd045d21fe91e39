"""Few-shot prompts and lettered choices say what their segments name, and keep the right answer."""

import pytest

import headwise as hw
from headwise.study import tasks
from headwise.study.formats import few_shot, lettered

SHOWN = [("a cat", "animal"), ("a rose", "plant"), ("a dog", "animal"), ("an oak", "plant"), ("a hen", "animal")]
ASKED = [("a cow", "animal"), ("a fern", "plant")]


def test_few_shot_prompts_show_every_label_as_often_as_can_be() -> None:
    for example, (text, label) in zip(few_shot(SHOWN, ASKED, shots=4), ASKED, strict=True):
        assert example.options[example.gold] == f" {label}"
        assert example.prompt.endswith(f"Input: {text}\nLabel:")
        assert (example.prompt.count("Label: animal"), example.prompt.count("Label: plant")) == (2, 2)
        assert example.prompt[slice(*example.spans["text"])] == text
        shots = [example.prompt[slice(*example.spans[f"shot {n}"])] for n in range(1, 5)]
        assert len(set(shots)) == 4
        assert set(shots) <= {f"Input: {a}\nLabel: {b}" for a, b in SHOWN}
    assert few_shot(SHOWN, ASKED, seed=0) == few_shot(SHOWN, ASKED, seed=0) != few_shot(SHOWN, ASKED, seed=3)
    [zero] = few_shot(SHOWN, ASKED[:1], shots=0)
    assert zero.prompt == "Input: a cow\nLabel:"


def test_letters_stand_for_the_options() -> None:
    plain = tasks.documents(0, 6, items=4)
    for before, after in zip(plain, lettered(plain), strict=True):
        letter = after.options[after.gold].strip()
        assert f"\n{letter}.{before.options[before.gold]}\n" in after.prompt
        assert after.options == (" A", " B", " C", " D")
        assert after.place == before.place
        assert after.prompt[slice(*after.spans["choices"])].count("\n") == 3
    assert len({example.gold for example in lettered(plain)}) > 1


def test_bad_input() -> None:
    for wrong in (
        lambda: few_shot(SHOWN, ASKED, shots=6),
        lambda: few_shot(SHOWN, ASKED, form="{label}: {text}"),
        lambda: few_shot(SHOWN, [("a stone", "mineral")]),
    ):
        with pytest.raises(hw.HeadwiseError, match="few_shot"):
            wrong()
