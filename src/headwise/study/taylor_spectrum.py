"""How many Taylor orders of the exponential do trained heads use, and do sink heads need more than others?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from headwise import scan
from headwise.models import Opened, open_model
from headwise.scan.result import Scan
from headwise.scan.taylor import TaylorOrders
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sinks import windows
from headwise.study.untrained import untrained

FROM, TO = 2, 10
"""The orders that the claim names."""


@study(
    "taylor_spectrum",
    paper=TaylorOrders.paper,
    room="scan",
    claim="Most trained heads have the mass of their exponential at Taylor orders 2 to 10; sink heads need more.",
)
def taylor_spectrum(
    model: Any = "zoo:llm",
    question: TaylorOrders = TaylorOrders(),  # noqa: B008 - frozen
    texts: int = 4,
    length: int = 512,
    draws: int = 10_000,
    seed: int = 0,
) -> Finding:
    """The paper measures models of its own training; this is one of another's. A head's mass is each row's `|s^n / n!|`
    over n, divided by its sum (`taylor_share`). Controls: the same architecture before training, and, for sink heads
    (a mean of 0.3 or more on the first token), the same number of heads of the same layers drawn at random."""
    opened = model if isinstance(model, Opened) else open_model(model)
    inputs = [{"input_ids": ids[None].to(opened.device)} for ids in windows(opened, texts, length)]
    asked = [question, "sinks"]
    found, fresh = (
        scan.heads(one, inputs=inputs, questions=asked, seed=seed) for one in (opened, untrained(opened, seed))
    )
    inside, inside_fresh = share_inside(found), share_inside(fresh)
    table = found.heads
    sink = (table["sinks"] >= scan.Sinks().threshold).to_numpy()
    needed = table["taylor_orders"].to_numpy()
    more, chance = against_layer(needed, sink, table["layer"].to_numpy(), draws, seed)
    mass = found.data["taylor_share"].sel(stream="text").mean(("layer", "head"))
    most, before = float((inside > 0.5).mean()), float((inside_fresh > 0.5).mean())
    holds = most > 0.5 and before <= 0.1 and more > 0 and chance < 0.01
    of_sinks, of_others = (np.median(needed[x]) if x.any() else np.nan for x in (sink, ~sink))
    decides = "whatever the layer" if more > 0 and chance < 0.01 else "so that the layer decides more than the sink"
    return Finding(
        measured={
            "heads_with_mass_at_2_to_10": most,
            "heads_with_mass_at_2_to_10_untrained": before,
            "share_at_2_to_10": {"median": np.median(inside), "untrained": np.median(inside_fresh)},
            "share_by_order": mass.values[: question.orders + 1],
            "mean_order": quartiles(table["taylor_mean_order"]),
            "mean_order_untrained": quartiles(fresh.heads["taylor_mean_order"]),
            "orders_needed": quartiles(needed),
            "orders_needed_untrained": quartiles(fresh.heads["taylor_orders"]),
            "heads_beyond_all_orders": (needed > question.orders).mean(),
            "error_of_order_2": quartiles(table["taylor_error_2"]),
            "sink_heads": sink.mean(),
            "orders_needed_median": {"sink": of_sinks, "other": of_others},
            "sink_minus_other_in_layer": more,
            "p": chance,
        },
        expected=(
            "More than half of the heads have more than half of their mass at orders 2 to 10, at most 10% do before "
            "training; sink heads need more orders than the other heads of their layers (p < 0.01)."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"{most:.0%} of heads have most of their mass at orders 2 to 10 ({before:.0%} before training), at a "
            f"median mean order of {table['taylor_mean_order'].median():.1f}. To be within {question.within:.0%} a "
            f"sink head needs order {of_sinks:.0f}, another one {of_others:.0f} (medians); within their layers sink "
            f"heads need {more:+.1f} (p = {chance:.2g}), {decides}."
        ),
        model=opened.name,
        seeds=[seed],
    )


def share_inside(found: Scan) -> Float[np.ndarray, " head"]:
    """Each head's share of mass at the orders of the claim."""
    share = found.data["taylor_share"].sel(stream="text", order=slice(FROM, TO)).sum("order", skipna=False)
    flat = share.values.ravel()
    return flat[~np.isnan(flat)]


def quartiles(x: Sequence[float]) -> list[float]:
    return np.quantile(np.asarray(x), (0.25, 0.5, 0.75)).tolist()


def against_layer(
    values: Float[np.ndarray, " head"],
    chosen: Bool[np.ndarray, " head"],
    layers: np.ndarray,
    draws: int,
    seed: int = 0,
) -> tuple[float, float]:
    """How far the mean of the chosen heads lies above that of the others, each head's layer's mean taken off; and how
    often as many heads drawn at random from the same layers lie as high (one of `draws` at least)."""
    if not chosen.any() or chosen.all():
        return 0.0, 1.0
    off = values - np.array([values[layers == layer].mean() for layer in layers])
    rng = np.random.default_rng(seed)

    def gap(mask: np.ndarray) -> float:
        return float(off[mask].mean() - off[~mask].mean())

    measured = gap(chosen)
    order = np.argsort(layers, kind="stable")  # within a layer the marks are shuffled, across layers they stay
    parts = np.split(chosen[order], np.flatnonzero(np.diff(layers[order])) + 1)
    high = 0
    for _ in range(draws):
        mask = np.empty_like(chosen)
        mask[order] = np.concatenate([rng.permutation(part) for part in parts])
        high += gap(mask) >= measured
    return measured, (1 + high) / (1 + draws)
