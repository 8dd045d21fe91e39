"""The words of the field for what heads do, and the column of a scan that measures each, or comes nearest.

Stages follow "Attention Heads of Large Language Models: A Survey" (2409.03752): recalling knowledge, identifying things
in the context, reasoning, preparing the expression. The axes of attention itself follow "An Attentive Survey of
Attention Models" (1904.02874).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd

from headwise.paper import Paper

if TYPE_CHECKING:
    from headwise.models import Opened

HEADS = Paper("Attention Heads of Large Language Models: A Survey", "2409.03752")
ATTENTION = Paper("An Attentive Survey of Attention Models", "1904.02874")

Stage = Literal["KR", "ICI", "LR", "EP"]
STAGES: dict[Stage, str] = {
    "KR": "knowledge recalling",
    "ICI": "in-context identification",
    "LR": "latent reasoning",
    "EP": "expression preparation",
}


@dataclass(frozen=True)
class Function:
    """One function of heads. `column` measures it, or is the nearest there is (`nearest`: what it leaves open)."""

    name: str
    stage: Stage
    does: str
    column: str
    nearest: str = ""

    @property
    def measured(self) -> bool:
        return not self.nearest


ABLATE = "tells where the head looks or what it writes, not whether {} needs it: silence it (HeadGain) and see"

FUNCTIONS = (
    Function("memory", "KR", "moves what is known of the subject to the last token", "maps_relations",
             "relations such as a country's capital, from the weights alone; not which facts a prompt calls up"),
    Function("constant", "KR", "looks at all options of a multiple-choice question alike", "constant_heads"),
    Function("single letter", "KR", "looks at one option letter, whatever the question", "single_letter"),
    Function("negative", "KR", 'prefers the "no" of yes or no', "negative_heads"),
    Function("previous token", "ICI", "looks one token back", "previous"),
    Function("positional", "ICI", "looks at a fixed distance", "positional_heads"),
    Function("duplicate token", "ICI", "looks at earlier copies of the token", "duplicate_token"),
    Function("rare words", "ICI", "looks at the rarest tokens of the text", "rare_tokens"),
    Function("retrieval", "ICI", "copies a fact from far back while the model says it", "retrieval_heads"),
    Function("global retrieval", "ICI", "retrieves over the whole of a long context", "long_context_heads",
             "how often the far context would get attention, not whether what is there is copied"),
    Function("subword merge", "ICI", "looks at earlier pieces of the word", "word_pieces"),
    Function("syntactic", "ICI", "looks along a grammatical relation", "relation_heads"),
    Function("name mover", "ICI", "looks at the name that is to be said, and copies it", "name_movers"),
    Function("letter mover", "ICI", "copies the first letters of several words to the end", "maps_first_letter",
             "whether the head writes a word's first letter, by its weights; not that it looks at the words in turn"),
    Function("negative name mover", "ICI", "writes against the name it looks at", "copy_heads",
             "below zero the head writes against any token it looks at, not names only"),
    Function("backup name mover", "ICI", "moves the name when the name movers are silenced", "name_movers",
             "scan again with the name movers silenced (attend with HeadGain around the scan) and compare"),
    Function("mover", "ICI", "copies what it looks at", "copy_heads"),
    Function("context", "ICI", "takes the answer from the context rather than from memory", "retrieval_heads",
             "on made-up facts, which no memory could know"),
    Function("content gatherer", "ICI", "brings the text of the right option to the end", "correct_letter",
             "looks at the right option's letter, not at its text"),
    Function("sentiment summariser", "ICI", "gathers the sentiment of a text at punctuation", "separator",
             "looks at punctuation; what it carries is for a probe on its output (scan.head_features) to tell"),
    Function("subject", "ICI", "looks at the subject of a sentence", "relation_nsubj"),
    Function("relation", "ICI", "looks at the words of a relation", "relation_heads",
             "grammatical relations between words, not named facts"),
    Function("semantic induction", "ICI", "looks from a word to one related to it", "topic_attention",
             "words of one topic, not named relations"),
    Function("induction", "LR", "looks at what followed the last copy of the token", "induction_heads"),
    Function("summary reader", "LR", "reads the sentiment gathered at punctuation", "separator",
             "looks at punctuation from any token; " + ABLATE.format("the sentiment")),
    Function("function vector", "LR", "carries the task of the examples", "induction_heads",
             "reading the examples again, not their task (scan.icl_score: how much the model gains from context)"),
    Function("in-context", "LR", "compares the examples with the question", "induction_heads",
             "on random tokens instead of labelled examples"),
    Function("truthfulness, accuracy, consistency", "LR", "carries whether an answer is true", "feature_entropy",
             "a probe on the head's output tells (scan.head_features and a linear model); the column says only how "
             "varied that output is"),
    Function("vulnerable", "LR", "reacts to misleading context", "input_dependence",
             "any change of the text, not misleading ones"),
    Function("correct letter", "LR", "looks at the letter of the right option", "correct_letter"),
    Function("iteration", "LR", "goes from an item of a list to the next", "recall_next",
             "on a list that is read twice"),
    Function("successor", "LR", "writes n + 1 of n", "maps_next"),
    Function("inhibition", "LR", "looks at the name not to be said, so that others pass it over", "s_inhibition"),
    Function("arithmetic", "LR", "carries numbers and operators to the result", "maps_next",
             "numbers in order by the weights, no sums; " + ABLATE.format("a sum")),
    Function("mixed", "EP", "gathers several inputs before the output", "entropy",
             "spreads its attention; what it gathers is not told"),
    Function("amplification", "EP", "strengthens what is about to be said", "copy_weights",
             "writes what it reads, by its weights; not that this was already likely"),
    Function("correct", "EP", "strengthens the right option", "correct_letter",
             "looks at the right letter; " + ABLATE.format("the answer")),
    Function("coherence", "EP", "keeps the expression in the language of the text", "salient_other_script",
             "whether it writes in another script than it reads, by its weights"),
    Function("faithfulness", "EP", "keeps the answer to the reasoning before it", "retrieval_active",
             "copies from the context while the model answers; " + ABLATE.format("the reasoning")),
)  # fmt: skip


def table() -> pd.DataFrame:
    """A row per function: its stage, what it does, its column, and what the column leaves open ("" for nothing)."""
    rows = [(f.name, STAGES[f.stage], f.does, f.column, f.nearest) for f in FUNCTIONS]
    return pd.DataFrame(rows, columns=["function", "stage", "does", "column", "leaves_open"])


AXES = ("stream", "layers", "sequences", "levels", "positions", "representations", "score", "distribution")


def axes(opened: Opened) -> pd.DataFrame:
    """The attention of a model in the words of the second survey, a row for every kind of layer it has.

    sequences: "self", or "distinctive" where queries and keys come from different ones. positions: "soft" over all, or
    "local" in a window. representations: "multi-head", with the number of key-value heads where fewer. score: "scaled
    dot", of normalised queries and keys, or with a soft cap. All models here are of one level (no hierarchy).
    """
    config = getattr(opened.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds: dict[tuple[str, ...], list[int]] = {}
    for site in opened.sites:
        window = getattr(site.module, "sliding_window", None) or getattr(site.module, "window_size", None)
        names = {name for name, _ in site.module.named_children()}
        normed = any(name in names for name in ("q_norm", "k_norm", "q_layernorm", "query_layernorm"))
        cap = getattr(text, "attn_logit_softcapping", None) if site.stream == "text" else None
        sink = getattr(site.module, "sinks", None)
        groups = "" if site.kv_heads == site.heads else f" on {site.kv_heads} key-value heads"
        row = (
            site.stream,
            "self" if site.kind == "self" else "distinctive",
            "single",
            f"local, window {window}" if isinstance(window, int) else "soft",
            f"{site.heads} heads{groups}",
            f"scaled dot{', normalised queries and keys' * normed}{f', soft cap {cap:g}' if cap else ''}",
            "softmax" if sink is None else "softmax with a learned sink",
        )
        kinds.setdefault(row, []).append(site.layer)
    rows = [(row[0], spans(layers), *row[1:]) for row, layers in kinds.items()]
    return pd.DataFrame(rows, columns=list(AXES))


def spans(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
