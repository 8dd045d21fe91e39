"""`headwise study evaluate` on a tiny model: the same numbers as the Python API's, steered or not."""

import json


def test_a_task_is_answered_plain_and_steered(headwise_cli, tiny, tmp_path):
    recipe = tmp_path / "recipe.json"
    asked = ("--prompt", "the cat", "--set", "gain=0", "--tokens", 1, "--save", recipe)
    assert headwise_cli("steer", "try", tiny, "ScaleHeads", *asked).code == 0
    said = headwise_cli(
        "study", "evaluate", tiny, "--task", "ioi", "--steer", recipe, "--count", 3, "--seed", 1, "--json"
    )
    assert said.code == 0, said.err
    rows = {(row["setting"], row["measure"]): row for row in json.loads(said.out)}
    assert set(rows) == {(s, m) for s in ("plain", "steered") for m in ("right", "logp")}
    steered, plain = rows["steered", "logp"], rows["plain", "logp"]
    assert plain["change"] is None
    assert abs(steered["change"]["mean"] - (steered["mean"] - plain["mean"])) < 1e-9
    assert "change (95%)" in headwise_cli("study", "evaluate", tiny, "--task", "ioi", "--count", 2).out


def test_an_unknown_task_is_told(headwise_cli, tiny):
    answer = headwise_cli("study", "evaluate", tiny, "--task", "chess")
    assert answer.code == 2
    assert "documents, key_values" in answer.err
