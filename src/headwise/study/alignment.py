"""Do the middle layers of a language model line up best with another system? Do good models line up with each other?

No brain data are at hand. A sentence encoder (MiniLM) stands in for the brain: these studies test the two hypotheses of
the review between models only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise import scan
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.layer_alignment import curve, ila_interval
from headwise.scan.needles import haystack
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.scenes import scenes
from headwise.study.train import Recipe, build, train, windows
from headwise.study.untrained import untrained

PAPER = Paper(
    "Brain-Language Model Alignment: Insights into the Platonic Hypothesis and Intermediate-Layer Advantage",
    "2510.17833",
)


def book_sentences(count: int | None = None, words: int = 5) -> list[str]:
    """The sentences of the English prose that have at least five words."""
    text = re.sub(r"\s+", " ", haystack())
    found = [s.strip() for s in re.split(r"(?<=[.!?;])\s+", text) if len(s.split()) >= words]
    return found[:count]


def simple_facts(texts: Sequence[str]) -> Float[Tensor, "text 3"]:
    """What any model could align by: length in words and in characters (logs), and the place in the book."""
    rows = [(np.log(len(t.split())), np.log(len(t)), n / len(texts)) for n, t in enumerate(texts)]
    return torch.tensor(rows, dtype=torch.float64)


@study(
    "intermediate_layers_align",
    paper=PAPER,
    room="scan",
    claim="The layer of a language model that lines up best with another system is an intermediate one, not the last.",
)
def intermediate_layers_align(
    model: Any = "zoo:llm", target: Any = "zoo:encoder", sentences: int | None = None, draws: int = 50, seed: int = 0
) -> Finding:
    """Every layer against the sentence embedding (mean of the last layer) of an encoder, on the sentences of the prose;
    length and place are taken out of both. Unbiased CKA of mean-pooled layers decides; last-token pooling, mutual
    nearest neighbours and an untrained model are reported beside. The last layer is read before the final norm."""
    opened, other = (m if isinstance(m, Opened) else open_model(m) for m in (model, target))
    texts = book_sentences(sentences)
    facts, aim = simple_facts(texts), scan.layer_features(other, texts, "mean")[-1]
    features = {rows: scan.layer_features(opened, texts, rows) for rows in ("mean", "last")}
    fresh = scan.layer_features(untrained(opened, seed), texts, "mean")
    main = ila_interval(features["mean"], aim, "cka", draws=draws, seed=seed, nuisance=facts)
    curves = {
        f"{method}_{rows}": curve(features[rows], aim, method, nuisance=facts)
        for rows in features
        for method in ("cka", "mknn")
    }
    beside = {name: scan.ila_index(values).as_dict() for name, values in curves.items()}
    control = scan.ila_index(curve(fresh, aim, "cka", nuisance=facts))
    first = main.peak - float(curves["cka_mean"][0])
    holds = main.layer < len(features["mean"]) - 1 and main.low > 0
    return Finding(
        measured={
            "sentences": len(texts),
            "advantage": main.as_dict(),
            "curve": curves["cka_mean"].values,
            "beside": beside,
            "untrained": control.as_dict(),
        },
        expected="The best layer comes before the last, by more than 0 at the lower end of the 95% interval.",
        verdict="holds" if holds else "fails",
        reason=(
            f"CKA with {other.name} peaks after layer {main.layer} of {len(features['mean'])} at {main.peak:.3f}, "
            f"{main.advantage:.3f} above the last layer (95%: {main.low:.3f} to {main.high:.3f}), {first:.3f} above "
            f"the first; with the last token instead of the mean after layer {beside['cka_last']['layer']}; untrained "
            f"at most {control.peak:.3f}. {other.name} stands in for the brain."
        ),
        model=f"{opened.name}, {other.name}",
        seeds=[seed],
    )


@study(
    "alignment_grows_with_training",
    paper=PAPER,
    room="scan",
    claim="Better language models line up better with another model: alignment grows in training and with quality.",
)
def alignment_grows_with_training(
    model: Any = "zoo:llm",
    target: Any = "zoo:encoder",
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 300,
    sentences: int | None = None,
) -> Finding:
    """Mutual 10-nearest-neighbour alignment (best layer, mean-pooled) with an encoder's sentence embedding: of a Llama
    of 4 layers and 128 channels before, during and after training on the first half of the prose, and of the full
    model, on the sentences of the second half. The small model knows only the tokens of the prose.
    It does not start from nothing: a mean of random token vectors is a bag of words."""
    opened, other = (m if isinstance(m, Opened) else open_model(m) for m in (model, target))
    texts = book_sentences(sentences)
    learnt, held = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    aim, facts = scan.layer_features(other, held, "mean")[-1], simple_facts(held)
    k = min(10, len(held) // 4)

    def best(one: Opened, inputs: Sequence[Any]) -> float:
        return float(curve(scan.layer_features(one, inputs, "mean"), aim, "mknn", k=k, nuisance=facts).max())

    marks = sorted({0, steps // 10, steps // 3, steps})
    stream, *inputs = renumbered(opened, [" ".join(learnt), *held])
    rows = [
        {
            mark: best(small, [{"input_ids": ids[None]} for ids in inputs])
            for mark, small in growing(stream, inputs, marks, seed)
        }
        for seed in seeds
    ]
    full = best(opened, held)
    grows = [row[marks[-1]] > row[0] for row in rows]
    holds = all(grows) and all(full > row[marks[-1]] for row in rows)
    mean = {mark: float(np.mean([row[mark] for row in rows])) for mark in marks}
    return Finding(
        measured={
            "steps": mean,
            "seeds": rows,
            "full_model": full,
            "chance": k / (len(held) - 1),
            "sentences": len(held),
        },
        expected="On every seed higher after training than before, and higher still for the full model.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Mutual nearest neighbours with {other.name}: {mean[0]:.3f} untrained, {mean[marks[-1]]:.3f} after "
            f"{steps} steps (grown on {sum(grows)} of {len(rows)} seeds), {full:.3f} for {opened.name}; chance "
            f"{k / (len(held) - 1):.3f}."
        ),
        model=f"{opened.name}, {other.name}",
        seeds=list(seeds),
    )


def renumbered(opened: Opened, texts: Sequence[str]) -> list[Int[Tensor, " token"]]:
    """The tokens of texts as numbers into those that occur."""
    ids = [opened.tokenizer(t, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for t in texts]
    numbers = torch.cat(ids).unique(return_inverse=True)[1]
    return list(numbers.split([len(row) for row in ids]))


def growing(
    stream: Int[Tensor, " token"], others: Sequence[Tensor], marks: Sequence[int], seed: int
) -> Iterator[tuple[int, Opened]]:
    """A small language model as it was after each number of steps on `stream`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1 + max(int(ids.max()) for ids in (stream, *others)),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    recipe = Recipe(steps=max(marks), lr=2e-3, warmup=20, decay="cosine", seed=seed)
    data = windows(stream, rows=8, length=min(64, len(stream)))
    trained = train(build(lambda: LlamaForCausalLM(config), seed), data, recipe, marks)
    return ((step, open_model(model)) for step, model in trained.each())


@study(
    "pictures_and_captions",
    paper=PAPER,
    room="scan",
    claim="A vision model and a text model line up on pictures and their captions, more than an untrained one.",
)
def pictures_and_captions(
    vision: Any = "zoo:vit", text: Any = "zoo:encoder", count: int = 80, seeds: Sequence[int] = (0, 1), draws: int = 99
) -> Finding:
    """Mutual 10-nearest-neighbours of mean patch features (best layer) and the caption's embedding, on drawn scenes of
    one coloured shape, as no vision-language model is at hand. The best layer is taken of each model, so that the
    untrained one has the same choice; p is for the trained model's best layer."""
    sight, reader = (m if isinstance(m, Opened) else open_model(m) for m in (vision, text))
    rows = []
    for seed in seeds:
        pictures, captions = scenes(count, seed=seed)
        aim = scan.layer_features(reader, captions, "mean")[-1]
        seen = scan.layer_features(sight, pictures, "mean")
        fresh = scan.layer_features(untrained(sight, seed), pictures, "mean")
        k = min(10, count // 4)
        trained, control = (curve(x, aim, "mknn", k=k) for x in (seen, fresh))
        p = scan.align(seen[int(trained.argmax("layer"))], aim, "mknn", k=k, permutations=draws, seed=seed).p
        rows.append(
            {
                "trained": float(trained.max()),
                "layer": int(trained.argmax("layer")),
                "last_layer": float(trained[-1]),
                "untrained": float(control.max()),
                "chance": k / (count - 1),
                "p": p,
            }
        )
    mean = {
        name: float(np.mean([row[name] for row in rows])) for name in ("trained", "last_layer", "untrained", "chance")
    }
    holds = all(row["trained"] > row["untrained"] and row["p"] < 0.05 for row in rows)
    return Finding(
        measured=mean | {"seeds": rows},
        expected="On every seed above chance (p below 0.05) and above the untrained model.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Mutual nearest neighbours {mean['trained']:.3f} for {sight.name}, {mean['untrained']:.3f} untrained, "
            f"{mean['chance']:.3f} by chance."
        ),
        model=f"{sight.name}, {reader.name}",
        seeds=list(seeds),
    )
