"""What do models take as their origin, and does it matter more than other tokens?"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from headwise import scan
from headwise.attention import ScoreBias, attend
from headwise.models import Opened, Segments, open_model
from headwise.paper import Paper
from headwise.scan.attention_graph import measures
from headwise.scan.needles import haystack
from headwise.study.finding import Finding
from headwise.study.photographs import PHOTOGRAPHS, photographs
from headwise.study.registry import study

PAPER = Paper("What are you sinking? A geometric approach on attention sink", "2508.02546")


def sentences(opened: Opened, count: int, most: int = 50, least: int = 6) -> list[dict[str, Tensor]]:
    """Sentences of the English prose of 6 to 50 tokens, spread over it."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(haystack().split()))
    batches = [opened.encode(sentence) for sentence in found]
    fitting = [b for b in batches if least <= b["input_ids"].shape[1] <= most]
    places = np.linspace(0, len(fitting) - 1, min(count, len(fitting))).astype(int)
    return [fitting[place] for place in places]


@study(
    "frame_types",
    paper=PAPER,
    room="scan",
    claim="Decoders with rotary positions take the first token as origin, encoders with absolute positions both ends.",
)
def frame_types(
    decoder: Any = "zoo:llm", encoder: Any = "zoo:encoder", vision: Any = "zoo:vit", texts: int = 60
) -> Finding:
    """On sentences of 6 to 50 tokens. Centralisation, star-likeness and Fiedler value are compared with those of
    uniform attention under the same mask, as a causal map is star-like in itself. MiniLM, a distilled sentence encoder
    of BERT's build, stands in for the paper's encoders. The frame of a vision model (None: left out) on photographs is
    reported beside."""
    measured: dict[str, Any] = {}
    for name, model in (("decoder", decoder), ("encoder", encoder)):
        opened = model if isinstance(model, Opened) else open_model(model)
        batches = sentences(opened, texts)
        result = scan.heads(opened, inputs=batches, questions=[scan.ReferenceFrames()])
        data = result.data.isel(stream=0)
        length = int(np.median([b["input_ids"].shape[1] for b in batches]))
        middle = next(b for b in batches if b["input_ids"].shape[1] >= length)
        n = middle["input_ids"].shape[1]
        sites = [site for site in opened.sites if site.kind == "self"]
        pairs = [(site.layer, site.layer % site.heads) for site in sites]
        causal = name == "decoder"
        even = np.tril(np.ones((n, n))) if causal else np.ones((n, n))
        null = measures(even / even.sum(1, keepdims=True))
        graphs = scan.attention_graphs(opened, middle, pairs)
        measured[name] = {
            "model": opened.name,
            **anchored(data),
            "fiedler": float(graphs["fiedler"].mean()),
            "fiedler_uniform": float(null["fiedler"]),
            "star": float(graphs["star"].mean()),
            "star_uniform": float(null["star"]),
            "components_at_half": float(graphs["betti0"].sel(level=0.5).mean()),
        }
    if vision is not None:
        opened = vision if isinstance(vision, Opened) else open_model(vision)
        pictures = photographs(PHOTOGRAPHS, 6, 224, seed=0).to(opened.device)
        found = scan.heads(opened, inputs=[{"pixel_values": pictures}], questions=[scan.ReferenceFrames()])
        measured["vision"] = {"model": opened.name} | anchored(found.data.isel(stream=0))
    one, two = measured["decoder"], measured["encoder"]
    holds = one["frame"] == "centralized" and two["frame"] == "bidirectional"
    return Finding(
        measured=measured,
        expected="The decoder centralized on its first token, the encoder bidirectional.",
        verdict="holds" if holds else "fails",
        reason=(
            f"{one['model']} is {one['frame']} ({one['anchor_mass']['first']:.0%} of the anchor mass on the first "
            f"token); {two['model']} is {two['frame']} ({two['anchor_mass']['first']:.0%} on the first, "
            f"{two['anchor_mass']['last']:.0%} on the last)."
        ),
        model=f"{one['model']}, {two['model']}",
    )


def anchored(data: xr.Dataset) -> dict[str, Any]:
    """What a scan of one stream says of its frame."""
    return {
        "frame": str(data["frame_type"].item()),
        "anchor_mass": {str(a): float(data["frame_mass"].sel(anchor=a)) for a in data["anchor"].values},
        "hubs": float(data["frame_hubs"]),
        "centralisation": float(data["reference_frames"].mean()),
        "gini": float(data["anchor_gini"].mean()),
    }


@study(
    "frame_origin_removed",
    paper=PAPER,
    room="scan",
    claim="Hiding the token that is the origin changes what a centralized model predicts far more than hiding another.",
)
def frame_origin_removed(model: Any = "zoo:llm", texts: int = 50, seed: int = 0) -> Finding:
    """KL of the next-token distributions, whole against one key hidden from all later queries (weights renormalised),
    averaged over the queries two places after the hidden token or later. Hidden: the first token; the second or third,
    the nearest to its place; a random later one. As queries soon after a hidden token miss it most, the same for all
    over one set of queries, those two places after the random token or later, is reported beside."""
    opened = model if isinstance(model, Opened) else open_model(model)
    draw = np.random.default_rng(seed)
    kinds: dict[str, list[float]] = {"first": [], "second": [], "third": [], "random": []}
    late: dict[str, list[float]] = {name: [] for name in kinds}
    for batch in sentences(opened, texts, least=12):
        n = batch["input_ids"].shape[1]
        places = {"first": 0, "second": 1, "third": 2, "random": int(draw.integers(3, n - 4))}
        for name, place in places.items():
            found = divergence(opened, batch, place)
            kinds[name].append(float(found[place + 2 :].mean()))
            late[name].append(float(found[places["random"] + 2 :].mean()))
    mean = {name: float(np.mean(values)) for name, values in kinds.items()}
    others = max(mean[name] for name in ("second", "third", "random"))
    share = float(np.mean(np.array(kinds["first"]) > np.array(kinds["random"])))
    holds = mean["first"] > 3 * others and share > 0.9
    return Finding(
        measured=mean
        | {"first_above_random": share, "texts": len(kinds["first"])}
        | {"same_queries": {name: float(np.mean(values)) for name, values in late.items()}},
        expected="A KL of more than 3 times any other place's, and above a random token's in 90% of the texts.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Hiding the first token gives a KL of {mean['first']:.2f} nats, the second {mean['second']:.2f}, the "
            f"third {mean['third']:.2f}, a random one {mean['random']:.2f}."
        ),
        model=opened.name,
        seeds=[seed],
    )


@torch.no_grad()
def divergence(opened: Opened, batch: dict[str, Tensor], place: int) -> Float[Tensor, " query"]:
    """KL(whole || without) of every query's next-token distribution, in nats, with one key hidden from later ones."""
    n = batch["input_ids"].shape[1]
    spans = {"hidden": (place, place + 1), "later": (place + 1, n)}
    whole = opened.model(**batch).logits
    edit = ScoreBias(value=-float("inf"), keys="hidden", queries="later")
    with attend(opened, edits=[edit], segments=Segments.from_spans(spans, n, rest="before")):
        without = opened.model(**batch).logits
    p, q = (F.log_softmax(x[0].float(), -1) for x in (whole, without))
    return (p.exp() * (p - q)).sum(-1)
