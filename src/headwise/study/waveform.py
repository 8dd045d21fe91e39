"""Does rotary attention have ripples over distance, and do several bases fill each other's troughs?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from headwise import scan
from headwise.attention import Rebase, attend
from headwise.attention.waveform import ripples
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.waveform import rank_correlation
from headwise.study.finding import Finding
from headwise.study.registry import study

PAPER = Paper(
    "Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for Effective Tool "
    "Use",
    "2312.04455",
)
SETS = {
    "tool_use": (10000, 17500, 18000, 19000, 20000, 25000),
    "documents": (10000, 13000, 16000, 19000, 22000, 25000, 28000),
}
"""The paper's sets of bases, for heads of width 128."""
RATIOS = (1.0, 1.5, 2.8)


@study(
    "waveform_envelope",
    paper=PAPER,
    room="scan",
    claim="The waveform has ripples, and the envelope of several bases has shallower troughs than any one of them.",
)
def waveform_envelope(max_distance: int = 4096, seed: int = 0) -> Finding:
    """Lowest point of the waveform over distances 1 to 4096 after dividing by its trend, for the largest over a set of
    bases (its own trend taken out) and for each base alone. The paper's sets as they are (width 128), and with the same
    ratios for zoo:llm (base 100,000, width 64). Beside it: 20 random sets of bases of the same range and number, the
    level that 5% of the distances lie below, and the lowest points of the waveforms themselves, trend and all."""
    draw = np.random.default_rng(seed)
    rows = []
    for name, bases in SETS.items():
        for width, scale in ((128, 1.0), (64, 10.0)):
            chosen = [scale * base for base in bases]
            together, alone = (
                envelope(chosen, width, max_distance),
                [envelope([b], width, max_distance) for b in chosen],
            )
            drawn = [draw.uniform(chosen[0], chosen[-1], len(bases) - 1) for _ in range(20)]
            others = [ripples(envelope([chosen[0], *bases], width, max_distance)).min() for bases in drawn]
            peaks, troughs = scan.rope_peaks(alone[0])
            rows.append(
                {
                    "set": name,
                    "head_dim": width,
                    "peaks": len(peaks),
                    "troughs": len(troughs),
                    "lowest_set": ripples(together).min(),
                    "lowest_alone": max(ripples(w).min() for w in alone),
                    "lowest_random_sets": np.mean(others),
                    "lowest_5%_set": np.quantile(ripples(together), 0.05),
                    "lowest_5%_alone": max(np.quantile(ripples(w), 0.05) for w in alone),
                    "with_trend_set": together.min(),
                    "with_trend_alone": max(w.min() for w in alone),
                }
            )
    holds = all(r["troughs"] > 10 and r["lowest_set"] > r["lowest_alone"] for r in rows)
    return Finding(
        measured={"sets": rows},
        expected="More than 10 troughs, and for every set a higher lowest point than for each of its bases alone.",
        verdict="holds" if holds else "fails",
        reason="; ".join(
            f"{r['set']}, width {r['head_dim']}: lowest {r['lowest_set']:.2f} of the trend for the set, "
            f"{r['lowest_alone']:.2f} for the best base (5% of the distances below {r['lowest_5%_set']:.2f} and "
            f"{r['lowest_5%_alone']:.2f})"
            for r in rows
        )
        + ".",
        model="none (a formula)",
        seeds=[seed],
    )


def envelope(bases: Sequence[float], width: int, max_distance: int) -> Float[np.ndarray, " distance"]:
    """The largest waveform of the bases at every distance from 1 on."""
    return np.max([scan.rope_waveform(scan.rope_frequencies(b, width), max_distance)[1:] for b in bases], axis=0)


@study(
    "waveform_attention",
    paper=PAPER,
    room="scan",
    claim="A rotary model's attention over distance follows the waveform of its base, also when the base is changed.",
)
def waveform_attention(
    model: Any = "zoo:llm", seed: int = 0, span: int = 256, seeds: int = 2, ratios: Sequence[float] = RATIOS
) -> Finding:
    """Mean attention over all heads by distance, on random tokens, with the model's own base and with others (`Rebase`
    in every layer); Spearman's correlation with the waveform of that base, as it is and with both trends taken out. p:
    how often the waveform without trend, shifted around by 8 or more tokens, correlates as well. Control: the waveforms
    of the other bases."""
    opened = model if isinstance(model, Opened) else open_model(model)
    frequencies = scan.model_frequencies(opened)
    width = 2 * len(frequencies)
    own = float(frequencies[1] ** (-width / 2))
    waves = [scan.rope_waveform(scan.rope_frequencies(own * r, width), span)[1:] for r in ratios]
    rows = []
    for ratio, wave in zip(ratios, waves, strict=True):
        question = scan.WaveformHeads(span=span, seeds=seeds, base=own * ratio, first_seed=seed)
        with attend(opened, edits=[] if ratio == 1 else [Rebase(theta=own * ratio, stream="text")]):
            found = scan.heads(opened, questions=[question])
        mean = found.data["attention_by_distance"].sel(stream="text").mean(["layer", "head"]).values
        flat, target = ripples(mean), ripples(wave)
        matched = float(rank_correlation(flat, target))
        shifted = np.array([float(rank_correlation(flat, np.roll(target, k))) for k in range(8, span - 7)])
        rows.append(
            {
                "ratio": ratio,
                "correlation": float(rank_correlation(mean, wave)),
                "without_trend": matched,
                "p": float((1 + (shifted >= matched).sum()) / (1 + len(shifted))),
                "with_other_bases": [float(rank_correlation(flat, ripples(w))) for w in waves],
                "heads_above_0": (found.heads["waveform_heads"] > 0).mean(),
            }
        )
    holds = all(r["correlation"] > 0.5 and r["without_trend"] > 0 and r["p"] < 0.05 for r in rows)
    return Finding(
        measured={"base": own, "bases": rows},
        expected="For every base a correlation above 0.5, and above 0 without trends with p < 0.05.",
        verdict="holds" if holds else "fails",
        reason="; ".join(
            f"base x {r['ratio']:g}: {r['correlation']:.2f}, without trends {r['without_trend']:.2f} (p = {r['p']:.2g})"
            for r in rows
        )
        + ".",
        model=opened.name,
        seeds=[seed],
    )
