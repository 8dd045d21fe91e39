"""Do more heads hurt where each gets narrower, and not where their width is fixed?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headwise import swap
from headwise.study.finding import Finding
from headwise.study.hosts import Vectors, matched
from headwise.study.registry import study
from headwise.study.swap_train import count
from headwise.study.train import Draw, Recipe, build, loss_of, train

DIM = 64


@study(
    "fixed_head_size",
    paper=swap.FixedHeadAttention.paper,
    room="swap",
    claim="At a fixed width of the model more heads hurt where they share it, and don't where each keeps its width.",
)
def fixed_head_size(
    seeds: Sequence[int] = (0, 1, 2), heads: Sequence[int] = (1, 4, 16), head_dim: int = 32, length: int = 32,
    symbols: int = 8, steps: int = 400,
) -> Finding:  # fmt: skip
    """Copy at an arbitrary offset: every token holds a symbol and the number of a token, asked is that token's symbol.
    One layer of width 64 that sees all tokens, with learned positions: what heads must do is match 32 numbers to 32
    places. Standard heads are 64 / heads wide, fixed ones `head_dim`. Control: standard heads with the feed-forward
    part widened to as many parameters as the fixed ones have.

    Why narrow heads don't fail here, said after the first run: to pick one token of 32 few dims are enough, as places
    on a sphere can all be singled out by long queries. What needs as many dims as tokens is to make any soft pattern
    (`low_rank_bottleneck`)."""
    draw = copies(length, symbols)
    loss: dict[str, dict[str, list[float]]] = {"standard": {}, "fixed": {}, "standard, as large": {}}
    sizes: dict[str, dict[str, int]] = {name: {} for name in loss}
    for number in heads:
        for seed in seeds:
            fixed = host(number, head_dim, symbols, length, seed)
            large = count(fixed)
            models = {
                "standard": host(number, DIM // number, symbols, length, seed),
                "fixed": fixed,
                "standard, as large": host(number, DIM // number, symbols, length, seed, large),
            }
            for name, model in models.items():
                train(model, draw, Recipe(steps, 1e-2, warmup=steps // 10, decay="cosine", seed=seed))
                loss[name].setdefault(str(number), []).append(loss_of(model, draw, 8, 10_000))
                sizes[name][str(number)] = count(model)
    mean = {name: {n: float(np.mean(v)) for n, v in found.items()} for name, found in loss.items()}
    few, many = str(heads[0]), str(heads[-1])
    best = min(mean["standard"].values())
    hurt = mean["standard"][many] - best
    below = all(a < b for a, b in zip(loss["fixed"][many], loss["standard, as large"][many], strict=True))
    holds = hurt > 0.1 and mean["fixed"][many] <= mean["fixed"][few] and below
    return Finding(
        measured={"loss": loss, "mean": mean, "parameters": sizes, "chance": float(np.log(symbols))},
        expected=(
            f"Standard heads lose more than 0.1 nats from their best number to {many}; fixed ones are at {many} no "
            f"worse than at {few}, and on every seed better than standard ones with as many parameters."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Loss with {', '.join(str(n) for n in heads)} heads: standard "
            f"{', '.join(f'{v:.3f}' for v in mean['standard'].values())}, fixed at {head_dim} "
            f"{', '.join(f'{v:.3f}' for v in mean['fixed'].values())}, standard with as many parameters "
            f"{', '.join(f'{v:.3f}' for v in mean['standard, as large'].values())} nats."
        ),
        model=f"one layer of width {DIM}, trained for {steps} steps",
        seeds=list(seeds),
    )


def host(heads: int, head_dim: int, symbols: int, length: int, seed: int, parameters: int | None = None) -> Vectors:
    def sized(hidden: int) -> Vectors:
        def layer(_: int) -> swap.FixedHeadAttention:
            return swap.FixedHeadAttention(DIM, heads, head_dim=head_dim)

        return Vectors(layer, symbols + length, DIM, 1, symbols, length, hidden, pooled=False)

    made = build(lambda: sized(2 * DIM) if parameters is None else matched(sized, parameters, 2 * DIM), seed)
    assert isinstance(made, Vectors)
    return made


def copies(length: int, symbols: int, rows: int = 32) -> Draw:
    """Tokens [symbol, number of a token] as two one-hot vectors, labelled with the symbol of the token they name."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        symbol = torch.randint(symbols, (rows, length), generator=generator)
        named = torch.randint(length, (rows, length), generator=generator)
        one_hot = [torch.nn.functional.one_hot(x, n) for x, n in ((symbol, symbols), (named, length))]
        return {"x": torch.cat(one_hot, -1).float(), "labels": symbol.gather(1, named)}

    return draw
