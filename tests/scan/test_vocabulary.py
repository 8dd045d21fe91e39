"""The vocabulary speaks of columns that exist, covers the survey's heads, and reads a model's kinds of attention."""

import transformers

from headwise import scan
from headwise.models import open_model
from headwise.scan import roles
from headwise.scan.vocabulary import FUNCTIONS, STAGES, axes, spans, table
from tests.models.tiny import t5
from tests.scan.models import llama

COLUMNS = {column.name for kind in scan.QUESTIONS for column in kind().columns()}
SURVEYED = """memory, constant, single letter, negative, previous token, positional, duplicate token, rare words,
retrieval, global retrieval, subword merge, syntactic, name mover, letter mover, negative name
mover, backup name mover, mover, context, content gatherer, sentiment summariser, subject, relation,
semantic induction, induction, summary reader, function vector, in-context, truthfulness, accuracy,
consistency, vulnerable, correct letter, iteration, successor, inhibition, arithmetic, mixed,
amplification, correct, coherence, faithfulness"""


def test_every_function_the_survey_names_has_a_column_that_exists() -> None:
    named = {name.strip() for function in FUNCTIONS for name in function.name.split(",")}
    assert named == {" ".join(name.split()) for name in SURVEYED.split(",")}
    assert {function.column for function in FUNCTIONS} <= COLUMNS
    assert len({function.name for function in FUNCTIONS}) == len(FUNCTIONS)
    assert {function.stage for function in FUNCTIONS} == set(STAGES)


def test_the_table_says_what_is_only_near() -> None:
    found = table().set_index("function")
    assert found.loc["induction", "leaves_open"] == ""
    assert found.loc["arithmetic", "leaves_open"]
    assert (found["leaves_open"] == "").sum() >= 17, "most of the heads that can be told from attention have a question"


def test_roles_speak_of_columns_that_exist() -> None:
    assert {column for role in roles.ROLES for column in role.needs} <= COLUMNS
    assert {role.stage for role in roles.ROLES} <= {*STAGES, ""}
    assert len(roles.rules()) == len(roles.ROLES) + 1


def test_axes_of_a_decoder_and_of_an_encoder_with_its_decoder() -> None:
    row = axes(llama()).iloc[0]
    assert (row["stream"], row["layers"], row["sequences"], row["positions"]) == ("text", "0-1", "self", "soft")
    assert row["representations"] == "4 heads on 2 key-value heads"
    assert axes(open_model(t5())).set_index("stream")["sequences"].to_dict().get("cross") == "distinctive"


def test_axes_tell_local_layers_and_normalised_queries() -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=7,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "full", "sliding")],
    )  # fmt: skip
    found = axes(open_model(transformers.Gemma3ForCausalLM(config).eval())).set_index("layers")
    assert found.loc["0, 2", "positions"] == "local, window 7"
    assert found.loc["1", "positions"] == "soft"
    assert "normalised queries and keys" in found.loc["1", "score"]


def test_spans_are_short() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert spans([]) == ""
