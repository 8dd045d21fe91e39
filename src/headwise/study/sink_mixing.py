"""Does the first-token sink keep tokens from mixing, and are the heads that rest on it idle?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from headwise import scan
from headwise.attention import HeadGain, ScoreBias, attend
from headwise.attention.hidden import hidden
from headwise.models import Opened, Segments, open_model
from headwise.paper import Paper
from headwise.scan.needs import quiet
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sinks import windows

PAPER = Paper("Why do LLMs attend to the first token?", "2504.02732")


@study(
    "sink_mixing",
    paper=PAPER,
    room="scan",
    claim="A changed token changes later hidden states more when the model cannot rest on its first token.",
)
def sink_mixing(model: Any = "zoo:llm", prompts: int = 20, length: int = 64, place: int = 5, seed: int = 0) -> Finding:
    """One early token is replaced by another of the text; `|h' - h| / |h|` is averaged over layers and later
    positions: plainly, with the first key hidden from all later queries, and, as a control, with the third key hidden,
    which is hardly looked at."""
    opened = model if isinstance(model, Opened) else open_model(model)
    draw = np.random.default_rng(seed)
    rows: dict[str, list[float]] = {"plain": [], "sink_hidden": [], "other_hidden": []}
    for ids in windows(opened, prompts, length):
        changed = ids.clone()
        others = [token for token in ids.tolist() if token != int(ids[place])]
        changed[place] = int(draw.choice(others))
        pair = torch.stack([ids, changed]).to(opened.device)
        for name, key in (("plain", None), ("sink_hidden", 0), ("other_hidden", 2)):
            rows[name].append(spread(opened, pair, place, key))
    mean = {name: float(np.mean(values)) for name, values in rows.items()}
    share = float(np.mean(np.array(rows["sink_hidden"]) > np.array(rows["plain"])))
    holds = share >= 0.9 and mean["sink_hidden"] > 1.2 * max(mean["plain"], mean["other_hidden"])
    return Finding(
        measured=mean | {"prompts_with_more": share},
        expected="More spread in 90% of the prompts, and 20% more on average than plainly or with another key hidden.",
        verdict="holds" if holds else "fails",
        reason=(
            f"The relative change of later hidden states is {mean['plain']:.3f} plainly, {mean['sink_hidden']:.3f} "
            f"with the first token hidden and {mean['other_hidden']:.3f} with the third hidden; it grows in "
            f"{share:.0%} of {prompts} prompts."
        ),
        model=opened.name,
        seeds=[seed],
    )


@torch.no_grad()
def spread(opened: Opened, pair: Int[Tensor, "2 token"], place: int, hide: int | None) -> float:
    """Mean relative change of the hidden states after `place`, over layers, with one key hidden from later queries."""
    n, found = pair.shape[1], []

    def look(layer: int, x: Tensor) -> None:
        x = x[:, place + 1 :].float()
        found.append(float(((x[1] - x[0]).norm(dim=-1) / x[0].norm(dim=-1)).mean()))

    edits, segments = [], None
    if hide is not None:
        segments = Segments.from_spans({"hidden": (hide, hide + 1), "later": (hide + 1, n)}, n, rest="before")
        edits = [ScoreBias(value=-float("inf"), keys="hidden", queries="later")]
    with attend(opened, edits=edits, segments=segments), hidden(opened, {"block_out": look}):
        opened.model(input_ids=pair, **quiet(opened.model))
    return float(np.mean(found))


@study(
    "sink_heads_idle",
    paper=PAPER,
    room="scan",
    claim="Silencing heads that rest on the first token costs far less than silencing heads that don't.",
)
def sink_heads_idle(
    model: Any = "zoo:llm", texts: int = 8, length: int = 128, layers: int = 8, seed: int = 0
) -> Finding:
    """In random layers the head with the highest and the head with the lowest first-token sink is silenced (output
    times 0), so that both sets come from the same layers; random heads of these layers beside. Sinks are measured on
    other text than the loss. Three draws of layers."""
    opened = model if isinstance(model, Opened) else open_model(model)
    rows = windows(opened, 2 * texts, length).to(opened.device)
    scored, held = rows[::2], rows[1::2]
    table = scan.heads(opened, inputs=[{"input_ids": scored}], questions=["sinks"]).heads
    table = table[table["stream"] == "text"]
    depth = int(table["layer"].max()) + 1
    clean = loss(opened, held, [])
    found: dict[str, list[float]] = {"resting": [], "working": [], "random": []}
    for number in range(3):
        draw = np.random.default_rng(seed + number)
        chosen = table[table["layer"].isin(draw.choice(depth, min(layers, depth), replace=False))]
        groups = chosen.sort_values("sinks").groupby("layer")
        sets = {"resting": groups.tail(1), "working": groups.head(1), "random": groups.sample(1, random_state=number)}
        for name, part in sets.items():
            pairs = [(int(r.layer), int(r.head)) for r in part.itertuples()]
            found[name].append(loss(opened, held, pairs) - clean)
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    holds = all(b > 2 * max(a, 0) for a, b in zip(found["resting"], found["working"], strict=True))
    return Finding(
        measured={"loss": clean, "rise": mean, "draws": found},
        expected="On every draw of layers the loss rises at least twice as much without the working heads.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Without the head of each of {layers} layers that rests most on the first token the loss of {clean:.2f} "
            f"changes by {mean['resting']:+.3f} nats, without the one that rests least by {mean['working']:+.3f}, "
            f"without a random one by {mean['random']:+.3f} (means of 3 draws)."
        ),
        model=opened.name,
        seeds=[seed, seed + 1, seed + 2],
    )


@torch.no_grad()
def loss(opened: Opened, ids: Int[Tensor, "row token"], silenced: list[tuple[int, int]]) -> float:
    edits = [HeadGain(heads=silenced, gain=0.0)] if silenced else []
    with attend(opened, edits=edits):
        logits: Float[Tensor, "row token word"] = opened.model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).item()
