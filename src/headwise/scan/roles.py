"""A short role for every head, by the first of these rules that its scores satisfy.

The words are those of `scan.vocabulary`; `stage` is the one the survey gives the function, "" where it names none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Role:
    name: str
    needs: Mapping[str, float]
    """Columns and the least score each must have."""
    rule: str
    stage: str = ""


ROLES = (
    Role("previous token", {"previous": 0.5}, "Mean attention to the token before is at least 0.5.", "ICI"),
    Role("next token", {"next": 0.5}, "Mean attention to the token after is at least 0.5.", "ICI"),
    Role("self", {"self": 0.5}, "Mean attention to the token itself is at least 0.5.", "ICI"),
    Role("induction", {"induction_heads": 0.4}, "Prefix matching on repeated random tokens is at least 0.4.", "LR"),
    Role(
        "retrieval",
        {"retrieval_heads": 0.1},
        "Copies at least 0.1 of hidden answers while the model gives them.",
        "ICI",
    ),
    Role("duplicate token", {"duplicate_token": 0.4}, "Attention to earlier copies of a token is at least 0.4.", "ICI"),
    Role(
        "name mover",
        {"name_movers": 0.3},
        "Attention to the name to be said is at least 0.3 above that to the other name.",
        "ICI",
    ),
    Role("inhibition", {"s_inhibition": 0.3}, "Attention to the name not to be said is at least 0.3.", "LR"),
    Role("subword merge", {"word_pieces": 0.3}, "Attention to a word's earlier pieces is 0.3 beyond distance.", "ICI"),
    Role("options", {"option_heads": 0.3}, "Attention to the letters of multiple choice is at least 0.3.", "KR"),
    Role(
        "separator",
        {"separator": 0.6},
        "Mean attention to punctuation, line breaks and special tokens is at least 0.6.",
    ),
    Role("sink", {"sinks": 0.3}, "Mean attention to the first token is at least 0.3."),
    Role("sink elsewhere", {"sinks_any": 0.3}, "Some token other than the first gets at least 0.3 of the attention."),
    Role("local", {"local": 0.8}, "At least 0.8 of the attention stays in the local window.", "ICI"),
)
MIXED = Role("mixed", {}, "None of the other rules holds.")


def assign(heads: pd.DataFrame) -> list[str]:
    """The role of every row; a rule whose columns were not asked for, or are unknown for a head, does not hold."""
    roles = []
    for _, row in heads.iterrows():
        fits = (
            role.name
            for role in ROLES
            if all(row.get(column, float("nan")) >= least for column, least in role.needs.items())
        )
        roles.append(next(fits, MIXED.name))
    return roles


def rules() -> dict[str, str]:
    return {role.name: role.rule for role in (*ROLES, MIXED)}
