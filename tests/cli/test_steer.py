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


def test_calibrate_writes_a_recipe(headwise_cli, tiny, tmp_path):
    recipe, examples = tmp_path / "recipe.json", tmp_path / "examples.jsonl"
    rows = [{"prompt": "the cat sat on", "answer": " a", "segments": {"emphasis": "cat"}}]
    rows += [{"prompt": "a dog saw", "answer": " it", "options": [" it", " a"], "segments": {"emphasis": "dog"}}]
    examples.write_text("\n".join(map(json.dumps, rows)))
    asked = ("steer", "calibrate", tiny, "emphasis", "--examples", examples, "--out", recipe)
    said = headwise_cli(*asked, "--grid", "alpha=[0.9,0.1]")
    assert said.code == 0, said.err
    [method] = json.loads(recipe.read_text())["methods"]
    assert method["settings"]["alpha"] in (0.9, 0.1)
    assert headwise_cli("generate", tiny, *PROMPT, "--span", "cat", "--steer", recipe).code == 0
    own = ("steer", "calibrate", tiny, "zero_tuning", "--examples", examples, "--out", recipe, "--with", "share=0.25")
    assert headwise_cli(*own).code == 0
    for change, told in (
        (("--grid", "alpha=0.1"), "NAME=[VALUE, ...]"),
        (("--with", "steps"), "--with steps"),
        (("--with", "steps=2"), "steps goes to"),
    ):
        answer = headwise_cli(*asked, *change)
        assert answer.code == 2
        assert told in answer.err
