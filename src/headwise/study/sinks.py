"""When is the first token a sink, and what does a sink's value look like?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise import scan
from headwise.attention import Inputs, Mass, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.needles import haystack
from headwise.scan.needs import quiet
from headwise.scan.tokens import random_tokens
from headwise.study.finding import Finding
from headwise.study.registry import study

EPS = 0.3


@study(
    "sink_inputs",
    paper=Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781"),
    room="scan",
    claim="The first token is a sink in natural text and in random tokens, and none where one token is repeated.",
)
def sink_inputs(model: Any = "zoo:llm", sequences: int = 100, length: int = 64, seed: int = 0) -> Finding:
    """Sink_1 at 0.3: the share of (layer, head, sequence) in which the first of 64 tokens gets more than 0.3 of the
    attention on average. Text windows start anywhere; no beginning token is put in front, as the model's tokenizer adds
    none. The same with one in front is reported beside."""
    opened = model if isinstance(model, Opened) else open_model(model)
    kinds = {
        "text": windows(opened, sequences, length),
        "random": random_tokens(opened, sequences, length, seed),
        "repeated": random_tokens(opened, sequences, 1, seed + 1).expand(-1, length),
    }
    rates = {name: sink_rate(opened, ids) for name, ids in kinds.items()}
    start = None if opened.tokenizer is None else opened.tokenizer.bos_token_id
    if start is not None:
        first = torch.full((sequences, 1), start)
        rates |= {f"{name}_with_bos": sink_rate(opened, torch.cat([first, x[:, 1:]], 1)) for name, x in kinds.items()}
    holds = rates["text"] > 0.4 and rates["random"] > 0.4 and rates["repeated"] < 0.05
    return Finding(
        measured=rates,
        expected="Above 0.4 in text and random tokens, below 0.05 for one repeated token.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Sink_1 is {rates['text']:.0%} in text, {rates['random']:.0%} in random tokens and "
            f"{rates['repeated']:.0%} for one repeated token."
        ),
        model=opened.name,
        seeds=[seed],
    )


@study(
    "sink_values",
    paper=Paper("Why do LLMs attend to the first token?", "2504.02732"),
    room="scan",
    claim="Many heads put most of their attention on the first token, and its value vector is small in those heads.",
)
def sink_values(model: Any = "zoo:llm", sequences: int = 16, length: int = 256) -> Finding:
    """Share of heads whose mean attention to the first token is above 0.3, and the share of these in which the first
    token's value is shorter than the median value. 0.8, the paper's mark for its large models, is reported beside."""
    opened = model if isinstance(model, Opened) else open_model(model)
    ids = windows(opened, sequences, length)
    mass, short = [], []
    for row in ids:
        with (
            attend(opened, readings=[Mass(("first",), per="head"), Inputs(("v",), stream="text")]) as run,
            torch.no_grad(),
        ):
            opened.model(input_ids=row[None].to(opened.device), **quiet(opened.model))
        seen = run.tree["text"]
        mass.append(seen["mass"].sel(segment="first").transpose("layer", "head").values)
        values = seen["input_v"].isel(sample=0).transpose("layer", "head", ..., "channel").values
        norm = np.linalg.norm(values, axis=-1)
        short.append(norm[..., 0] / np.median(norm, -1))
    first, ratio = np.mean(mass, 0), np.mean(short, 0)
    sink = first > EPS
    small = float((ratio[sink] < 1).mean()) if sink.any() else 0.0
    measured = {
        "sink_rate_0.3": sink.mean(),
        "sink_rate_0.8": (first > 0.8).mean(),
        "small_value_share": small,
        "value_ratio_sinks": np.median(ratio[sink]) if sink.any() else None,
        "value_ratio_others": np.median(ratio[~sink]) if not sink.all() else None,
    }
    holds = sink.mean() > 0.4 and small > 0.5
    return Finding(
        measured=measured,
        expected="More than 40% of heads above 0.3; in more than half of them a value shorter than the median.",
        verdict="holds" if holds else "fails",
        reason=(
            f"{sink.mean():.0%} of heads give the first token more than 0.3; in {small:.0%} of them its value is "
            f"shorter than the median value (windows of {length} tokens, no beginning token)."
        ),
        model=opened.name,
    )


def windows(opened: Opened, count: int, length: int, start: float = 0.0) -> Int[Tensor, "count length"]:
    """Windows of the English prose from a share `start` of it on, evenly spread; they overlap where the text is too
    short for as many."""
    ids = opened.tokenizer(haystack(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < length:
        raise HeadwiseError(f"length: the text has {len(ids)} tokens, fewer than the {length} asked for.")
    starts = np.linspace(start * (len(ids) - length), len(ids) - length, count).astype(int)
    return torch.stack([ids[s : s + length] for s in starts])


def sink_rate(opened: Opened, ids: Float[Tensor, "sequence token"], eps: float = EPS) -> float:
    """Sink_1 of all heads over these sequences."""
    prompts = [{"input_ids": rows.to(opened.device)} for rows in ids.split(20)]
    found = scan.heads(opened, inputs=prompts, questions=[scan.Sinks(threshold=eps)])
    return float(found.heads["sink_share"].mean())
