"""Do rotary embeddings prefer near keys by themselves?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention import Inputs, attend
from headwise.attention.rope import find_rotary
from headwise.errors import HeadwiseError
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.distance_bias import DistanceBias, draw, unturned
from headwise.scan.needles import haystack
from headwise.scan.needs import quiet
from headwise.scan.question import Prompt
from headwise.study.finding import Finding
from headwise.study.registry import study

ASKED = DistanceBias(queries=400, pairs=10_000)
CLEAR = 0.5
"""A bias of at least half its standard deviation over pairs is clear."""


@study(
    "distance_bias_rope",
    paper=Paper("Positional Encoding via Token-Aware Phase Attention", "2509.12635"),
    room="scan",
    claim="Rotary embeddings give heads a preference for near or far keys that is known before any content.",
)
def distance_bias_rope(
    model: Any = "zoo:llm", question: DistanceBias = ASKED, length: int = 1024, texts: int = 2, seed: int = 0
) -> Finding:
    """10,000 pairs of a near and a far key a head and text. Controls: the same tokens in another order, where content
    knows no distance, and the same queries and keys with their rotation taken off. The curve predicted from the mean
    query and key is compared with the measured one over distances 1, 2, 4, ... . That the paper's own encoding has less
    bias needs a model trained with it, and is not measured here."""
    opened = model if isinstance(model, Opened) else open_model(model)
    ids = opened.tokenizer(haystack(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < texts * length:
        raise HeadwiseError(f"length: the text has {len(ids)} tokens, not {texts} times {length}.")
    found: dict[str, list[np.ndarray]] = {"text": [], "shuffled": [], "unrotated": []}
    likeness, means = [], []
    for number, passage in enumerate(ids[: texts * length].view(texts, length)):
        asked = replace(question, first_seed=seed + number)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed + number))
        for name, tokens in (("text", passage), ("shuffled", passage[order])):
            values = asked.observe(opened, Prompt({"input_ids": tokens[None].to(opened.device)}))["text"]
            score = asked.score(values)
            found[name].append((score["distance_bias"] / score["distance_bias_spread"]).values.ravel())
            if name == "text":
                means.append(score["distance_bias"].values.ravel())
                likeness.append(correlations(asked.profiles(values)))
        gap = unrotated_gap(opened, passage.to(opened.device), asked)
        found["unrotated"].append((gap.mean(-1) / gap.std(-1)).ravel())
    clear = {name: float((np.abs(np.mean(ratios, 0)) >= CLEAR).mean()) for name, ratios in found.items()}
    alike = np.mean(likeness, 0)
    near = float((np.mean(found["text"], 0) >= CLEAR).mean())
    holds = clear["text"] >= 0.5 and clear["unrotated"] <= 0.1 and float((alike >= 0.9).mean()) >= 0.75
    return Finding(
        measured={
            "clear_share": clear,
            "clear_and_near": near,
            "median_ratio": {name: np.median(np.abs(np.mean(x, 0))) for name, x in found.items()},
            "mean_bias": np.mean(means),
            "prediction_median": np.median(alike),
            "prediction_above_0.9": (alike >= 0.9).mean(),
            "near": question.near,
            "far": question.far or [length // 2, length // 2 + 100],
        },
        expected=(
            "In at least half of the heads a mean of at least half a standard deviation, without rotation in at most "
            "10%; measured and predicted curves correlate by at least 0.9 in 75% of heads."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"{clear['text']:.0%} of heads have a clear bias in text ({near:.0%} for near keys), "
            f"{clear['shuffled']:.0%} with shuffled tokens, {clear['unrotated']:.0%} with the rotation taken off; the "
            f"predicted curve correlates with the measured one by 0.9 or more in {(alike >= 0.9).mean():.0%}."
        ),
        model=opened.name,
        seeds=range(seed, seed + texts),
    )


def correlations(profiles: dict[str, Any]) -> Float[np.ndarray, " place"]:
    """Of the measured and the predicted curve, for every head."""
    if "distance_bias_predicted" not in profiles:
        raise HeadwiseError("model: the study compares with rotary embeddings, and this model has none.")
    curves = (profiles[f"distance_bias_{name}"].values for name in ("curve", "predicted"))
    one, two = (x.reshape(-1, x.shape[-1]) for x in curves)
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(one, two, strict=True)])


def unrotated_gap(
    opened: Opened, ids: Int[Tensor, " token"], question: DistanceBias
) -> Float[np.ndarray, "layer head pair"]:
    """Near minus far score of the question's pairs from queries and keys whose rotation is taken off (up to the scale,
    which a ratio of mean and spread does not see)."""
    rotary = find_rotary(opened.model, opened.sites[0].module)
    assert rotary is not None  # the prediction came first
    plan = draw(question, len(ids))
    queries = torch.tensor(plan.readings[0].queries)
    targets = plan.readings[0].targets[queries]  # type: ignore[attr-defined]
    with attend(opened, readings=[Inputs(("q", "k"), stream="text")]) as run, torch.no_grad():
        opened.model(input_ids=ids[None], **quiet(opened.model))
    seen, gaps = run.tree["text"], []
    place = torch.arange(len(ids)).float()
    for layer in seen["layer"].values:
        q, k = (
            unturned(torch.tensor(seen[f"input_{name}"].sel(layer=layer).isel(sample=0).values)[None], place, rotary)[0]
            for name in ("q", "k")
        )
        scores = torch.einsum("hqc,hqtc->hqt", q[:, queries], k[:, targets])
        gaps.append((scores[..., : plan.each] - scores[..., plan.each :]).flatten(1).numpy())
    return np.stack(gaps)
