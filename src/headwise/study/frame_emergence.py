"""When in training does a model take an origin, and do its weights then stand out from noise?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from headwise import scan
from headwise.models import open_model
from headwise.scan.spectrum import mp_outliers
from headwise.study.finding import Finding
from headwise.study.reference_frames import PAPER
from headwise.study.registry import study
from headwise.study.sink_language import SinkLanguage, small_llama
from headwise.study.train import Recipe, build, train


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
