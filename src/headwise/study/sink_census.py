"""Where are the sinks beyond the first token, and is a head better off without them?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from headwise import scan
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.sink_census import SinkCensus
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sinks import windows

PAPER = Paper(
    "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
    "Attention Calibration",
    "2406.15765",
)


@study(
    "later_sinks",
    paper=PAPER,
    room="scan",
    claim="Heads of the middle layers have sinks beyond the first token; the first two layers and the last have few.",
)
def later_sinks(
    model: Any = "zoo:llm", texts: int = 16, length: int = 128, question: SinkCensus | None = None
) -> Finding:
    """Share of (head, text) with a token after the first that gets more than 0.1, per layer, on windows of English
    prose. As a control the same with the tokens of each window shuffled."""
    opened = model if isinstance(model, Opened) else open_model(model)
    asked = question or SinkCensus()
    ids = windows(opened, texts, length)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, rows in (("text", ids), ("shuffled", ids[:, order])):
        batches = [{"input_ids": part.to(opened.device)} for part in rows.split(8)]
        result = scan.heads(opened, inputs=batches, questions=[asked])
        found[name] = result.data["later_sink_heads"].isel(stream=0).values
    table = scan.later_sink_tokens(opened, inputs=[{"input_ids": ids[:8].to(opened.device)}], question=asked)
    depth = len(found["text"])
    middle = float(found["text"][depth // 4 : -(-3 * depth // 4)].mean())
    ends = {"first": float(found["text"][0]), "second": float(found["text"][1]), "last": float(found["text"][-1])}
    holds = middle >= 0.1 and all(share < middle / 2 for share in ends.values())
    common = table["token"].value_counts(normalize=True).head(8)
    return Finding(
        measured={
            "middle_half": middle,
            **ends,
            "by_layer": found["text"],
            "by_layer_shuffled": found["shuffled"],
            "tokens": {str(token): float(share) for token, share in common.items()},
        },
        expected="At least 10% in the middle half of the layers; less than half of that in the first two and the last.",
        verdict="holds" if holds else "fails",
        reason=(
            f"{middle:.0%} of heads and texts in the middle half of the layers have a later sink; {ends['first']:.0%} "
            f"in the first layer, {ends['second']:.0%} in the second, {ends['last']:.0%} in the last. The most common "
            f"of them is {common.index[0]!r} ({common.iloc[0]:.0%})."
            if len(common)
            else f"No head has a token after the first that gets more than {asked.threshold:g}."
        ),
        model=opened.name,
        seeds=[0],
    )


@study(
    "later_sinks_harm",
    paper=PAPER,
    room="scan",
    claim="Most sinks beyond the first token hurt: a head whose later sinks are weakened serves the model better.",
)
def later_sinks_harm(
    model: Any = "zoo:llm",
    heads: int = 32,
    texts: int = 6,
    length: int = 96,
    question: SinkCensus | None = None,
    seed: int = 0,
) -> Finding:
    """The next-token loss on English prose instead of the accuracy on classification sets, which a model of this size
    does not do. Heads with later sinks are drawn at random, and one head's sinks at a time keep 0.4 of their attention;
    as a control as many other tokens of that head, drawn at random, do. Bad: the mean loss falls."""
    opened = model if isinstance(model, Opened) else open_model(model)
    asked = question or SinkCensus()
    batches = [{"input_ids": ids[None].to(opened.device)} for ids in windows(opened, texts, length)]
    table = scan.heads(opened, inputs=batches, questions=[asked]).heads
    having = table[table["later_sink_share"] > 0.5]
    if len(having) < 2:
        return Finding({}, "", "untestable", "Too few heads have sinks beyond the first token.", opened.name, [seed])
    chosen = having.sample(min(heads, len(having)), random_state=seed)
    pairs = [(int(r.layer), int(r.head)) for r in chosen.itertuples()]
    draw = np.random.default_rng(seed)

    def elsewhere(share: np.ndarray, count: int) -> np.ndarray:
        common = np.flatnonzero(share[1:-8] <= asked.threshold) + 1
        return draw.choice(common, min(count, len(common)), replace=False)

    found = scan.sink_effects(opened, pairs, inputs=batches, question=asked)
    control = scan.sink_effects(opened, pairs, inputs=batches, question=asked, instead=elsewhere)
    bad, bad_control = float((found["change"] < 0).mean()), float((control["change"] < 0).mean())
    holds = bad > 0.5 and bad > bad_control
    return Finding(
        measured={
            "heads_with_later_sinks": len(having) / len(table),
            "bad_share": bad,
            "bad_share_control": bad_control,
            "mean_change": found["change"].mean(),
            "mean_change_control": control["change"].mean(),
            "clearly": found["kind"].value_counts().to_dict(),
            "best": found.nsmallest(3, "change")[["layer", "head", "change"]].values.tolist(),
            "worst": found.nlargest(3, "change")[["layer", "head", "change"]].values.tolist(),
        },
        expected="The loss falls for more than half of the heads, and for more of them than with random tokens.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Weakening the later sinks of one head lowers the loss for {bad:.0%} of {len(pairs)} heads (mean change "
            f"{found['change'].mean():+.5f} nats), weakening as many random tokens for {bad_control:.0%} "
            f"({control['change'].mean():+.5f})."
        ),
        model=opened.name,
        seeds=[seed],
    )
