"""`headwise steer` and `headwise generate` on a tiny model."""

import json

PROMPT = ("--prompt", "the cat sat on a mat and")


def test_list_names_every_method_with_its_paper(headwise_cli):
    rows = json.loads(headwise_cli("steer", "list", "--json").out)
    assert {"TokenScale", "Emphasis", "Knockout"} <= {row["method"] for row in rows}
    assert all(row["what"] and row["paper"]["arxiv"] for row in rows)
    assert "TokenScale" in headwise_cli("steer", "list").out


def test_try_shows_both_texts_and_the_recipe_gives_the_steered_one_again(headwise_cli, tiny, tmp_path):
    recipe = tmp_path / "recipe.json"
    asked = ("--set", "gain=0", "--set", "heads=[[0,1],[1,0],[1,1],[1,2]]", "--tokens", 8)
    said = headwise_cli("steer", "try", tiny, "scale_heads", *PROMPT, *asked, "--save", recipe)
    assert said.code == 0, said.err
    assert "with ScaleHeads" in said.out
    plain = headwise_cli("generate", tiny, *PROMPT, "--tokens", 8).out
    steered = headwise_cli("generate", tiny, *PROMPT, "--tokens", 8, "--steer", recipe).out
    assert plain.startswith("the cat sat on a mat and")
    assert plain != steered


def test_a_span_can_be_emphasised(headwise_cli, tiny):
    said = headwise_cli(
        "steer", "try", tiny, "Emphasis", *PROMPT, "--span", "cat sat", "--set", "alpha=0.1", "--tokens", 4
    )
    assert said.code == 0, said.err


def test_mistakes_are_told_in_a_sentence(headwise_cli, tiny, tmp_path):
    for asked, said in (
        (("steer", "try", tiny, "Magic", *PROMPT), "no steering method 'Magic'"),
        (("steer", "try", tiny, "TokenScale", *PROMPT, "--set", "colour=1"), "NAME=VALUE"),
        (("steer", "try", tiny, "TokenScale", *PROMPT, "--set", "gain=-2"), "TokenScale(gain=...)"),
        (("steer", "try", tiny, "Knockout", *PROMPT), "cannot be made"),
        (("steer", "try", tiny, "Emphasis", *PROMPT, "--span", "elephant"), "does not stand in the prompt"),
        (("generate", tiny, *PROMPT, "--steer", tmp_path / "none.json"), "cannot be read"),
    ):
        answer = headwise_cli(*asked)
        assert answer.code == 2
        assert said in answer.err
