"""`headwise steer` and `headwise generate` on a tiny model."""

import json

import torch
from tests.cli.conftest import WORDS
from transformers import T5Config, T5ForConditionalGeneration

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


def test_a_recipe_that_speaks_of_the_last_token_or_of_several_spans_runs(headwise_cli, tiny, tmp_path):
    recipe, examples = tmp_path / "recipe.json", tmp_path / "examples.jsonl"
    rows = [("the cat sat on", " a"), ("a dog saw", " it"), ("it was", " tired"), ("the dog sat", " on")]
    examples.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in rows))
    asked = ("steer", "calibrate", tiny, "SoftInjection", "--examples", examples, "--out", recipe, "--with", "steps=4")
    said = headwise_cli(*asked)
    assert said.code == 0, said.err
    assert "SoftInjection(embedding=tensor [2, 4, 8], alpha=tensor [2, 4])" in said.out
    assert headwise_cli("generate", tiny, *PROMPT, "--steer", recipe, "--tokens", 3).code == 0
    documents = ("--set", 'documents=["one","two"]', "--set", "relevance=[1,9]", "--set", "first_layer=0")
    spans = ("--span", "one=the cat", "--span", "two=on a mat", "--tokens", 6)
    said = headwise_cli("steer", "try", tiny, "FoundInTheMiddle", *PROMPT, *documents, *spans, "--save", recipe)
    assert said.code == 0, said.err
    said = headwise_cli("generate", tiny, *PROMPT, *spans, "--steer", recipe)
    assert said.code == 0, said.err
    answer = headwise_cli("generate", tiny, *PROMPT, "--steer", recipe)
    assert answer.code == 2
    assert "no segment 'one'" in answer.err


def test_the_text_goes_on_with_the_space_that_stands_between(headwise_cli, tiny):
    prompt, _, rest = headwise_cli("generate", tiny, *PROMPT, "--tokens", 4).out.strip().partition("and")
    assert (prompt, rest[:1]) == ("the cat sat on a mat ", " ")


def test_an_encoder_decoder_writes_a_text_of_its_own(headwise_cli, tiny, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
    ids = {"vocab_size": 3 + len(WORDS), "decoder_start_token_id": 1, "pad_token_id": 2, "eos_token_id": 2}
    T5ForConditionalGeneration(T5Config(**sizes, **ids)).save_pretrained(tmp_path)
    for file in tiny.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    said = headwise_cli("generate", tmp_path, *PROMPT, "--tokens", 5)
    assert said.code == 0, said.err
    assert set(said.out.split()) <= set(WORDS)
    assert not said.out.startswith("the cat sat")
    shown = headwise_cli("steer", "try", tmp_path, "ScaleHeads", *PROMPT, "--tokens", 5)
    assert shown.code == 0, shown.err
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"prompt": "the cat", "answer": " sat"}))
    answer = headwise_cli("steer", "calibrate", tmp_path, "TokenScale", "--examples", examples, "--out", "r.json")
    assert answer.code == 2
    assert "decoder-only" in answer.err


def test_mistakes_are_told_in_a_sentence(headwise_cli, tiny, tmp_path):
    for asked, said in (
        (("steer", "try", tiny, "Magic", *PROMPT), "no steering method 'Magic'"),
        (("steer", "try", tiny, "TokenScale", *PROMPT, "--set", "colour=1"), "NAME=VALUE"),
        (("steer", "try", tiny, "TokenScale", *PROMPT, "--set", "gain=-2"), "TokenScale(gain=...)"),
        (("steer", "try", tiny, "TokenScale", *PROMPT, "--set", "gain=much"), "must be a number; got 'much'"),
        (("steer", "try", tiny, "TokenScale", *PROMPT, "--set", "gain=2", "--set", "heads=3"), "(layer, head) pairs"),
        (("steer", "try", tiny, "TokenScale", *PROMPT, "--set", "gain=2", "--set", "heads=[[0,9]]"), "heads 0 to 3"),
        (("steer", "try", tiny, "Knockout", *PROMPT), "cannot be made without --set keys=..."),
        (("steer", "try", tiny, "ScaleHeads", *PROMPT, "--save", "recipe.txt"), "ends in .json"),
        (("steer", "try", tiny, "Emphasis", *PROMPT, "--span", "elephant"), "does not stand in the prompt"),
        (("generate", tiny, *PROMPT, "--span", "one="), "does not stand in the prompt"),
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
    answer = headwise_cli(*own, "--with", "colour=1")
    assert answer.code == 2
    assert "takes mode, per, share, grid, probe as arguments; got colour" in answer.err
    for change, told in (
        (("--grid", "alpha=0.1"), "NAME=[VALUE, ...]"),
        (("--grid", 'alpha=["a"]'), "a number; got 'a'"),
        (("--with", "steps"), "--with steps"),
        (("--with", "steps=2"), "steps goes to"),
    ):
        answer = headwise_cli(*asked, *change)
        assert answer.code == 2
        assert told in answer.err
