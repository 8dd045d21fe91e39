"""What do models take as their origin, does it matter more than other tokens, and when in training does it arise?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from headwise import scan
from headwise.attention import ScoreBias, attend
from headwise.models import Opened, Segments, open_model
from headwise.paper import Paper
from headwise.scan.attention_graph import measures
from headwise.scan.needles import haystack
from headwise.scan.spectrum import mp_outliers
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sink_language import SinkLanguage, small_llama
from headwise.study.train import Recipe, build, train

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
def frame_types(decoder: Any = "zoo:llm", encoder: Any = "zoo:encoder", texts: int = 60) -> Finding:
    """On sentences of 6 to 50 tokens. Centralisation, star-likeness and Fiedler value are compared with those of
    uniform attention under the same mask, as a causal map is star-like in itself."""
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
            "frame": str(data["frame_type"].item()),
            "anchor_mass": {str(a): float(data["frame_mass"].sel(anchor=a)) for a in data["anchor"].values},
            "hubs": float(data["frame_hubs"]),
            "centralisation": float(data["reference_frames"].mean()),
            "gini": float(data["anchor_gini"].mean()),
            "fiedler": float(graphs["fiedler"].mean()),
            "fiedler_uniform": float(null["fiedler"]),
            "star": float(graphs["star"].mean()),
            "star_uniform": float(null["star"]),
            "components_at_half": float(graphs["betti0"].sel(level=0.5).mean()),
        }
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


@study(
    "frame_origin_removed",
    paper=PAPER,
    room="scan",
    claim="Hiding the token that is the origin changes what a centralized model predicts far more than hiding another.",
)
def frame_origin_removed(model: Any = "zoo:llm", texts: int = 50, seed: int = 0) -> Finding:
    """KL of the next-token distributions, whole against one key hidden from all later queries (weights renormalised),
    averaged over the queries two places after the hidden token or later. Hidden: the first token; the second or third,
    the nearest to its place; a random later one."""
    opened = model if isinstance(model, Opened) else open_model(model)
    draw = np.random.default_rng(seed)
    kinds: dict[str, list[float]] = {"first": [], "second": [], "third": [], "random": []}
    for batch in sentences(opened, texts, least=12):
        n = batch["input_ids"].shape[1]
        places = {"first": 0, "second": 1, "third": 2, "random": int(draw.integers(3, n - 4))}
        for name, place in places.items():
            kinds[name].append(divergence(opened, batch, place))
    mean = {name: float(np.mean(values)) for name, values in kinds.items()}
    others = max(mean[name] for name in ("second", "third", "random"))
    share = float(np.mean(np.array(kinds["first"]) > np.array(kinds["random"])))
    holds = mean["first"] > 3 * others and share > 0.9
    return Finding(
        measured=mean | {"first_above_random": share, "texts": len(kinds["first"])},
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
def divergence(opened: Opened, batch: dict[str, Tensor], place: int) -> float:
    """KL(whole || without) in nats, mean over the queries from two places after the hidden key on."""
    n = batch["input_ids"].shape[1]
    spans = {"hidden": (place, place + 1), "later": (place + 1, n)}
    whole = opened.model(**batch).logits
    edit = ScoreBias(value=-float("inf"), keys="hidden", queries="later")
    with attend(opened, edits=[edit], segments=Segments.from_spans(spans, n, rest="before")):
        without = opened.model(**batch).logits
    p, q = (F.log_softmax(x[0, place + 2 :].float(), -1) for x in (whole, without))
    return float((p.exp() * (p - q)).sum(-1).mean())


@study(
    "frame_emergence",
    paper=PAPER,
    room="scan",
    claim="The origin appears early in training, together with eigenvalues of the weights beyond those of noise.",
)
def frame_emergence(
    seeds: Sequence[int] = (0, 1, 2), steps: int = 500, schemes: Sequence[str] = ("rope", "rope_scaled", "two_way")
) -> Finding:
    """Small models trained on packed bigrams with back-copying: a decoder with rotary positions, the same with
    positions stretched eight times, and an encoder with learned positions, a first and a last special token. Followed:
    the most that any head gives the first token (in the encoder: the first or the last), and the outliers of W_Q and
    W_K beyond the Marchenko-Pastur edge. The verdict is about the rotary decoder: half of the final rise, and an
    outlier, within the first 20% of the steps, on every seed."""
    kept = sorted({0, *(round(steps * share) for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0))})
    rows = []
    for scheme in schemes:
        for seed in seeds:
            model, draw = small_model(scheme, seed)
            trained = train(model, draw, Recipe(steps, lr=3e-3, warmup=20, seed=seed), keep=kept)
            held = {k: v for k, v in draw(torch.Generator().manual_seed(10_000 + seed)).items() if k == "input_ids"}
            anchors, outliers, frame = [], [], ""
            for _, one in trained.each():
                opened = open_model(one)
                found = scan.heads(opened, inputs=[held], questions=[scan.ReferenceFrames(threshold=0.2)])
                anchors.append(float(np.nanmax(found.heads[["anchor_first", "anchor_last"]].to_numpy())))
                frame = str(found.data["frame_type"].isel(stream=0).item())
                weights = [w.transpose(1, 2).flatten(0, 1) for s in opened.sites for w in (s.W_Q, s.W_K)]
                outliers.append(sum(mp_outliers(w).count for w in weights))
            half = anchors[0] + (anchors[-1] - anchors[0]) / 2
            rose = next(step for step, value in zip(kept, anchors, strict=True) if value >= half)
            spiked = next((step for step, count in zip(kept, outliers, strict=True) if count), steps + 1)
            rows.append(
                {"scheme": scheme, "seed": seed, "anchor": anchors, "outliers": outliers, "frame": frame}
                | {"half_at": rose / steps, "outlier_at": spiked / steps, "loss": float(trained.losses[-20:].mean())}
            )
    judged = [r for r in rows if r["scheme"] == "rope"]
    early = [r["half_at"] <= 0.2 and r["outlier_at"] <= 0.2 and r["outliers"][0] == 0 for r in judged]
    grown = [r["anchor"][-1] >= 2 * r["anchor"][0] for r in judged]
    frames = {scheme: [r["frame"] for r in rows if r["scheme"] == scheme] for scheme in schemes}
    return Finding(
        measured={"steps": kept, "runs": rows, "frames": frames},
        expected="In every rotary decoder the first token's largest share at least doubles, half of the rise and the "
        "first outlier come within the first 20% of the steps, and there is no outlier before training.",
        verdict="holds" if judged and all(early) and all(grown) else "fails",
        reason=(
            f"In rotary decoders the largest share of the first token goes from {judged[0]['anchor'][0]:.2f} to "
            f"{listed(r['anchor'][-1] for r in judged)}, half of the rise after {listed(r['half_at'] for r in judged)} "
            f"of the steps, with the first outlier after {listed(r['outlier_at'] for r in judged)}. Frames: "
            + "; ".join(f"{scheme} {', '.join(names)}" for scheme, names in frames.items())
            + "."
        ),
        model="small Llama and BERT trained here",
        seeds=list(seeds),
    )


def listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.2f}" for number in numbers)


def small_model(scheme: str, seed: int) -> tuple[torch.nn.Module, Any]:
    """A model with one way of telling positions, and what it is trained on."""
    language = SinkLanguage(bos="fixed", rows=16)
    if scheme == "two_way":
        draw = two_way(language)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = BertConfig(**sizes, vocab_size=language.words + 3, max_position_embeddings=language.length)
        return build(lambda: BertForMaskedLM(config), seed), draw
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}
    return build(lambda: small_llama(language, **(scaled if scheme == "rope_scaled" else {})), seed), language


def two_way(language: SinkLanguage, share: float = 0.15) -> Any:
    """Masked prediction of the same documents, between the beginning token and an end token."""
    end, mask = language.words + 1, language.words + 2

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        ids = language.window(generator)[0]
        ids[:, -1] = end
        hidden = torch.rand(ids.shape, generator=generator) < share
        hidden[:, [0, -1]] = False
        return {"input_ids": torch.where(hidden, mask, ids), "labels": torch.where(hidden, ids, -100)}

    return draw
