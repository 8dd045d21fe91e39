"""What does a head do best? Its most salient operations, read from the weights alone, and rules that name them (MAPS).

`gain(v) = |f(e_v) W_V W_O| / |f(e_v)|` for every token v of the vocabulary: the tokens of largest gain are those the
head is made for, and the largest logits of `f(e_v) W_V W_O U` are what it makes of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.scan.grid import grid
from headwise.scan.maps_relations import PAPER, text_sites
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.token_maps import after_first_mlp, embedded, lacks_token_map, site_of, unembedding, values


class Mapping(NamedTuple):
    """A token, how much the head amplifies it, and the tokens the head makes of it, the strongest first."""

    token: str
    gain: float
    targets: list[str]


def salient_mappings(
    opened: Opened, layer: int, head: int, n_tokens: int = 30, n_targets: int = 5, first_mlp: bool = True
) -> list[Mapping]:
    """The `n_tokens` tokens of largest gain with the `n_targets` tokens each becomes."""
    if reason := lacks_token_map(opened, first_mlp):
        raise HeadwiseError(f"salient_mappings: {opened.name} lacks {reason}.")
    site = site_of(opened, layer, head)
    read = vocabulary(opened, first_mlp, layer)
    z, out = values(site, read, head), output_of(site, head)
    gains, tokens, targets = salient(z, read.norm(dim=-1), out, unembedding(opened), n_tokens, n_targets)
    names = opened.tokenizer.batch_decode(tokens[:, None])
    made = opened.tokenizer.batch_decode(targets.reshape(-1, 1))
    rows = [made[n * n_targets : (n + 1) * n_targets] for n in range(len(names))]
    return [Mapping(*row) for row in zip(names, gains.tolist(), rows, strict=True)]


def vocabulary(opened: Opened, first_mlp: bool, layer: int) -> Float[Tensor, "vocabulary model"]:
    """What heads of this layer read of every token the tokenizer has."""
    size = min(len(opened.tokenizer), opened.model.get_input_embeddings().num_embeddings)
    ids = torch.arange(size, device=opened.device)
    return after_first_mlp(opened, ids) if first_mlp and layer else embedded(opened, ids)


def output_of(site: Site, head: int) -> Float[Tensor, "channel model"]:
    return site.W_O[head].detach().float()


@torch.no_grad()
def salient(
    z: Float[Tensor, "vocabulary channel"],
    lengths: Float[Tensor, " vocabulary"],
    out: Float[Tensor, "channel model"],
    unembed: Float[Tensor, "model vocabulary"],
    n_tokens: int,
    n_targets: int,
) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"], Int[Tensor, "token target"]]:
    """Gains, tokens and targets of one head, from its values and the lengths of what they were made from."""
    written = (z @ (out @ out.T) * z).sum(-1).clamp(min=0).sqrt()  # |z W_O| without making z W_O for every token
    gains, tokens = (written / lengths.clamp(min=1e-30)).topk(n_tokens)
    return gains, tokens, (z[tokens] @ out @ unembed).topk(n_targets, dim=-1).indices


def salient_prompt(mappings: Sequence[Mapping]) -> str:
    """What to ask a language model or a person who is to say what the head does."""
    lines = "\n".join(f"{m.token!r} -> {', '.join(map(repr, m.targets))}" for m in mappings)
    return (
        "Below is what one part of a language model makes of single tokens: on the left a token it reads, on the right "
        "the tokens whose probability it raises most, the strongest first. Tokens may be pieces of words, names, code "
        "or other languages.\n\n"
        f"{lines}\n\n"
        "In one sentence each: (1) What kind of tokens stand on the left? (2) By what rule are the tokens on the right "
        'made from the one on the left? If most lines follow no common rule, answer "Unclear" to (2).'
    )


def _script(word: str) -> str:
    letters = [c for c in word if c.isalpha()]
    return unicodedata.name(letters[0], "?").split()[0] if letters else "none"


def _stem(a: str, b: str) -> bool:
    """Whether two words share at least 4 letters at the front, and all but 4 of the longer one."""
    a, b = a.lower(), b.lower()
    shared = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a != b and shared >= 4 and max(len(a), len(b)) - shared <= 4


RULES: dict[str, Callable[[str, str], bool]] = {
    "identity": lambda a, b: a == b,
    "case": lambda a, b: a != b and a.lower() == b.lower(),
    "stem": _stem,
    "first_letter": lambda a, b: len(b) == 1 and a[:1].lower() == b.lower() and len(a) > 1,
    "completion": lambda a, b: a.lower() != b.lower() and min(len(a), len(b)) > 1
    and (b.lower().startswith(a.lower()) or a.lower().endswith(b.lower())),
    "other_script": lambda a, b: _script(a) != _script(b) and "none" not in (_script(a), _script(b)),
}  # fmt: skip
"""Rule -> whether the target b follows from the token a by it; both without surrounding spaces."""


def describe_rules(mappings: Sequence[Mapping]) -> dict[str, float]:
    """For each rule the share of tokens of which at least one target follows by it."""
    if not mappings:
        raise HeadwiseError("mappings: wanted at least one; got none.")
    words = [(m.token.strip(), [t.strip() for t in m.targets]) for m in mappings]
    return {name: float(np.mean([any(rule(a, b) for b in bs) for a, bs in words])) for name, rule in RULES.items()}


@dataclass(frozen=True)
class SalientOperations(Question):
    """`salient_operations`: the share of a head's most amplified tokens that its most frequent rule explains;
    `salient_<rule>`: each rule's share. "identity": writes the token itself; "case": the same letters in another case;
    "stem": another form of the word; "first_letter"; "completion": the token is the start of what is written, or ends
    in it; "other_script". What rules can't see (translations, topics) needs a reader: `salient_mappings`,
    `salient_prompt`."""

    n_tokens: int = 30
    n_targets: int = 5
    first_mlp: bool = True
    threshold: float = 0.5  # type: ignore[misc]
    paper: ClassVar[Paper] = PAPER
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or self.n_targets < 1:
            raise HeadwiseError(
                "SalientOperations wants n_tokens= and n_targets= of at least 1; got "
                f"{self.n_tokens!r}, {self.n_targets!r}."
            )

    def columns(self) -> tuple[Column, ...]:
        unit, where = (
            "share of tokens",
            f"From the weights alone, over the {self.n_tokens} tokens the head amplifies most: ",
        )
        text = {
            "identity": "how often it writes the token itself.",
            "case": "how often it writes the same letters in another case.",
            "stem": "how often it writes another form of the word.",
            "first_letter": "how often it writes the token's first letter.",
            "completion": "how often the token starts, or ends in, what it writes.",
            "other_script": "how often it writes in another script.",
        }
        best = Column(
            "salient_operations", "A rule in its weights", f"{where}the share that one simple rule explains.", unit,
            "does one thing to words", self.threshold,
        )  # fmt: skip
        return best, *(
            Column(f"salient_{name}", f"Rule: {name.replace('_', ' ')}", where + text[name], unit, "follows this rule")
            for name in RULES
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_token_map(opened, self.first_mlp)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        return [Prompt({"input_ids": torch.zeros(1, 1, dtype=torch.long, device=opened.device)})]

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        unembed = unembedding(opened)
        deep = vocabulary(opened, self.first_mlp, layer=1)
        shares: dict[int, list[list[float]]] = {}
        for site in text_sites(opened):
            read = vocabulary(opened, self.first_mlp, site.layer) if site.layer == 0 else deep
            lengths = read.norm(dim=-1)
            for head in range(site.heads):
                z = values(site, read, head) if head % site.group == 0 else z  # heads of a group share their values
                gains, tokens, targets = salient(
                    z, lengths, output_of(site, head), unembed, self.n_tokens, self.n_targets
                )
                text = opened.tokenizer.batch_decode(torch.cat([tokens[:, None], targets], 1).reshape(-1, 1))
                wide = 1 + self.n_targets
                rows = [text[n * wide : (n + 1) * wide] for n in range(len(tokens))]
                mappings = [Mapping(row[0], g, row[1:]) for row, g in zip(rows, gains.tolist(), strict=True)]
                shares.setdefault(site.layer, []).append(list(describe_rules(mappings).values()))
        tables = {layer: torch.tensor(rows) for layer, rows in shares.items()}
        rules = [grid({layer: rows[:, n] for layer, rows in tables.items()}) for n in range(len(RULES))]
        return {"text": xr.Dataset({"share": xr.concat(rules, "rule").assign_coords(rule=list(RULES))})}

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        share = values["share"]
        each = {f"salient_{name}": share.sel(rule=name, drop=True) for name in RULES}
        return {"salient_operations": share.max("rule"), **each}
