"""Do the weights of a head tell what it does when the model runs, and is it the cause?"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attention import HeadGain, HeadOutput, Inputs, attend
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened, Segments, open_model
from headwise.scan.maps_relations import PAPER, among, default_k, static_hits, text_sites
from headwise.scan.needs import quiet
from headwise.scan.token_maps import after_first_mlp, embedded, unembedding, values
from headwise.scan.word_pairs import relation, single_tokens
from headwise.study.finding import Finding
from headwise.study.registry import study

TEMPLATES = (
    ("No", " means no"),
    ("The story of", " contains"),
    ("This is a document about", ""),
    ("When I think about", " I think about"),
)
"""What stands before and after the source word; the last token of all is where the head's output is read."""
CLAIMED = ("copying", "name_copying", "past_tense", "comparative")
CAUSAL = ("antonym", "comparative", "superlative", "past_tense", "plural", "capital", "language", "next", "superclass")
SHOTS = 3
Heads = list[tuple[int, int]]


def token_pairs(opened: Opened, name: str, most: int) -> Int[Tensor, "pair 2"]:
    """The first `most` pairs of a relation that are one token a word."""
    pairs = single_tokens(opened.tokenizer, relation(name).pairs)[:most]
    if len(pairs) <= SHOTS:
        raise HeadwiseError(
            f"relations: {opened.name}'s tokenizer writes {len(pairs)} pairs of {name} with one token a word; wanted "
            f"more than {SHOTS}."
        )
    return torch.tensor(pairs, device=opened.device)


@torch.no_grad()
def dynamic_outputs(
    opened: Opened, source: Int[Tensor, " item"], before: str, after: str
) -> dict[int, tuple[Float[Tensor, "head item channel"], Float[Tensor, "head item channel"]]]:
    """Layer -> what each head outputs at the last token of a template, as it is and with all of its attention forced
    onto the source word. Forced, with every layer's input as in the clean run, the output is the source's value."""
    front, back = (opened.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    start = opened.tokenizer.bos_token_id
    front = front if start is None else [start, *front]
    left, right = (source.new_tensor(ids).expand(len(source), -1) for ids in (front, back))
    ids = torch.cat([left, source[:, None], right], dim=1)
    place = len(front)
    readings = [HeadOutput("vector", queries=[-1], stream="text"), Inputs(("v",), stream="text")]
    with attend(opened, readings) as run:
        opened.model(input_ids=ids, **quiet(opened.model))
    seen = run.tree["text"].to_dataset()
    order = ("layer", "head", "sample", "channel")
    clean = seen["head_output"].isel(query=-1).transpose(*order)
    value = seen["input_v"]
    forced = value.isel({next(d for d in value.dims if d not in order): place}).transpose(*order)
    return {
        int(layer): (torch.as_tensor(a.values).float(), torch.as_tensor(b.values).float())
        for layer, a, b in zip(clean["layer"].values, clean, forced, strict=True)
    }


@study(
    "maps_correlation",
    paper=PAPER,
    room="scan",
    claim="What a head's weights map a word to is what it writes when it attends to that word in a text.",
)
def maps_correlation(
    model: Any = "zoo:llm", relations: Sequence[str] = CLAIMED, pairs: int = 30, seed: int = 0
) -> Finding:
    """Pearson's r over heads and four templates between phi (weights) and the share of pairs whose target is among the
    top k of the head's output at the last token: with the head's own attention, and with all attention on the source
    word. Control: phi with the targets shuffled among the pairs."""
    opened = model if isinstance(model, Opened) else open_model(model)
    both = {name: token_pairs(opened, name, pairs) for name in relations}
    sizes = [len(p) for p in both.values()]
    source, target = torch.cat(list(both.values())).T
    k = torch.cat([torch.full((n,), default_k(opened, relation(r).copying)) for r, n in zip(both, sizes, strict=True)])
    k = k.to(target.device)
    draw = torch.Generator().manual_seed(seed)
    shuffled = torch.cat([p[torch.randperm(len(p), generator=draw), 1] for p in both.values()])
    outputs = [dynamic_outputs(opened, source, *template) for template in TEMPLATES]
    unembed, raw, deep = unembedding(opened), embedded(opened, source), after_first_mlp(opened, source)
    scores: list[Float[Tensor, "kind relation head"]] = []
    for site in text_sites(opened):
        static = torch.stack([values(site, deep if site.layer else raw, head) for head in range(site.heads)])
        kinds = [static, static, *(part for out in outputs for part in out[site.layer])]
        wanted = torch.cat([target, shuffled, *[target] * (len(kinds) - 2)])
        hit = among(site, torch.cat([z.to(target.device) for z in kinds], 1), wanted, k.repeat(len(kinds)), unembed)[0]
        hit = hit.float().unflatten(1, (len(kinds), -1))
        scores.append(torch.stack([part.mean(-1) for part in hit.split(sizes, -1)], -1).permute(1, 2, 0))
    table = torch.cat(scores, -1).cpu().numpy()
    rows = {}
    for n, name in enumerate(both):
        phi, control, clean, forced = table[0, n], table[1, n], table[2::2, n], table[3::2, n]
        r, p = pearson(np.tile(phi, len(TEMPLATES)), forced.flatten())
        rows[name] = {
            "pairs": sizes[n],
            "r_forced": r,
            "p_forced": p,
            "r_in_context": pearson(np.tile(phi, len(TEMPLATES)), clean.flatten())[0],
            "highest_phi": phi.max(),
            "highest_phi_shuffled": control.max(),
        }
    holds = all(
        row["r_forced"] > 0.3 and row["p_forced"] < 1e-3 and row["highest_phi_shuffled"] < row["highest_phi"] / 2
        for row in rows.values()
    )
    named = ", ".join(f"{name} {row['r_forced']:.2f} ({row['r_in_context']:.2f})" for name, row in rows.items())
    return Finding(
        measured=rows,
        expected="In every relation r > 0.3 with p < 0.001 under forced attention, and shuffled pairs below half.",
        verdict="holds" if holds else "fails",
        reason=f"Pearson's r with attention forced onto the word (with the head's own): {named}.",
        model=opened.name,
        seeds=[seed],
    )


def pearson(x: Float[np.ndarray, " item"], y: Float[np.ndarray, " item"]) -> tuple[float, float]:
    """r and its p-value; nan where one of the two is constant."""
    if not np.ptp(x) or not np.ptp(y):
        return float("nan"), float("nan")
    found = need("scipy.stats", "analysis").pearsonr(x, y)
    return float(found.statistic), float(found.pvalue)


def shots(opened: Opened, name: str, pairs: Int[Tensor, "pair 2"]) -> Int[Tensor, "item token"]:
    """`The rule is the past tense: go -> went, come -> came, see -> saw, make ->`, the first pairs as examples."""

    def encoded(text: str) -> list[int]:
        return opened.tokenizer(text, add_special_tokens=False)["input_ids"]

    start = [] if opened.tokenizer.bos_token_id is None else [opened.tokenizer.bos_token_id]
    front = start + encoded(f"The rule is {relation(name).phrase}:")
    for source, target in pairs[:SHOTS].tolist():
        front += [source, *encoded(" ->"), target, *encoded(",")]
    rest = pairs[SHOTS:, :1]
    left, right = (torch.tensor(ids, device=pairs.device).expand(len(rest), -1) for ids in (front, encoded(" ->")))
    return torch.cat([left, rest, right], dim=1)


@torch.no_grad()
def correct(
    opened: Opened, ids: Int[Tensor, "item token"], target: Int[Tensor, " item"], without: Heads | None = None
) -> Bool[Tensor, " item"]:
    """Whether the next token is the target, with the outputs of some heads at the last token set to 0."""
    edits = [HeadGain(heads=without, gain=0.0, tokens="last", stream="text")] if without else []
    segments = Segments.from_spans({"last": (ids.shape[1] - 1, ids.shape[1])}, ids.shape[1])
    with attend(opened, edits=edits, segments={"text": segments}):
        return opened.model(input_ids=ids, **quiet(opened.model)).logits[:, -1].argmax(-1) == target


def ordered_heads(opened: Opened, pairs: Mapping[str, Int[Tensor, "pair 2"]], most: int) -> dict[str, Heads]:
    """For each relation the heads with phi > 0, the highest first."""
    every = torch.cat(list(pairs.values()))
    k = torch.full((len(every),), default_k(opened, copying=False), device=every.device)
    hits = {layer: hit[0].float() for layer, hit in static_hits(opened, every[:, 0], every[:, 1], k).items()}
    found, sizes = {}, [len(some) for some in pairs.values()]
    for n, name in enumerate(pairs):
        phi = {layer: hit.split(sizes, -1)[n].mean(-1) for layer, hit in hits.items()}
        ranked = sorted(((float(x), layer, h) for layer, row in phi.items() for h, x in enumerate(row)), reverse=True)
        found[name] = [(layer, head) for score, layer, head in ranked[:most] if score > 0]
    return found


def controls(name: str, base: dict[str, float], heads: dict[str, Heads]) -> Iterator[str]:
    """Relations the model is about as good at, and whose heads are others: base within 0.2, overlap below 15%."""
    for other in base:
        shared = len(set(heads[name]) & set(heads[other])) / max(len(heads[name]), 1)
        if other != name and abs(base[other] - base[name]) <= 0.2 and shared < 0.15:
            yield other


@study(
    "maps_causal",
    paper=PAPER,
    room="scan",
    claim="Removing the heads whose weights map a relation destroys the model's use of it; random heads don't.",
)
def maps_causal(
    model: Any = "zoo:llm",
    relations: Sequence[str] = CAUSAL,
    pairs: int = 33,
    most: int = 30,
    draws: int = 5,
    base_min: float = 0.3,
    seed: int = 0,
) -> Finding:
    """Three examples and a fourth word to complete. Heads with phi > 0 (at most 30, as the paper takes for a model of
    fewer than 300 heads) are set to 0 at the last token, against as many random other heads, and against the accuracy
    of control relations under the same removal. Only relations the model masters (accuracy of at least `base_min`)."""
    opened = model if isinstance(model, Opened) else open_model(model)
    tokens = {name: token_pairs(opened, name, pairs) for name in relations}
    prompts = {name: shots(opened, name, both) for name, both in tokens.items()}
    targets = {name: both[SHOTS:, 1] for name, both in tokens.items()}
    base = {name: correct(opened, prompts[name], targets[name]).float().mean().item() for name in relations}
    known = [name for name in relations if base[name] >= base_min]
    heads = ordered_heads(opened, {name: tokens[name] for name in known}, most) if known else {}
    everything = [(site.layer, head) for site in text_sites(opened) for head in range(site.heads)]
    draw = random.Random(seed)
    rows = {}
    for name in (name for name in known if heads[name]):

        def accuracy(removed: Heads, of: str) -> float:
            return correct(opened, prompts[of], targets[of], removed).float().mean().item()

        others = [head for head in everything if head not in heads[name]]
        randoms = [accuracy(draw.sample(others, len(heads[name])), name) for _ in range(draws)]
        changes = [base[o] - accuracy(heads[name], o) for o in controls(name, {n: base[n] for n in known}, heads)]
        rows[name] = {
            "heads": len(heads[name]),
            "accuracy": base[name],
            "drop": base[name] - accuracy(heads[name], name),
            "drop_random": base[name] - float(np.mean(randoms)),
            "drop_control": float(np.mean(changes)) if changes else None,
        }
    if not rows:
        raise HeadwiseError(f"{opened.name} masters none of the relations that some head maps ({base}).")
    beats_random = [row["drop"] > row["drop_random"] + 0.1 for row in rows.values()]
    beats_control = [row["drop"] > row["drop_control"] for row in rows.values() if row["drop_control"] is not None]
    holds = np.mean(beats_random) >= 0.75 and (not beats_control or np.mean(beats_control) >= 0.75)
    mean = {key: float(np.mean([row[key] for row in rows.values()])) for key in ("accuracy", "drop", "drop_random")}
    return Finding(
        measured={"relations": rows, "accuracy_of_all": base, **mean},
        expected="In 3/4 of the relations the drop is 0.1 above that of random heads, and above the controls'.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Over {len(rows)} relations accuracy {mean['accuracy']:.2f} drops by {mean['drop']:.2f}, for random heads "
            f"by {mean['drop_random']:.2f}; {sum(beats_random)} of {len(rows)} beat random heads by 0.1, "
            f"{sum(beats_control)} of {len(beats_control)} the control relations."
        ),
        model=opened.name,
        seeds=[seed],
    )
