"""How much do the features vary that attention and the feed-forward part write, and which attention could go?

Feature entropy, with a Gaussian for every channel and constants dropped: `H(F) = sum_j log sigma_j` in nats, sigma_j
the standard deviation of channel j over samples; correlations between channels are ignored. Transfer entropy of the
attention of layer i, with the attentions in S removed already: `TE_i = |H(F_out; S) - H(F_out; S + {i})|`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import attend
from headwise.attention.hidden import Look, chosen_blocks, hidden
from headwise.attention.readings import HeadOutput
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.models.blocks import find_blocks
from headwise.paper import Paper
from headwise.scan.needs import quiet
from headwise.scan.question import Column, Prompt, Question

PAPER = Paper("MLP Can Be A Good Transformer Learner", "2404.05657")
PLACES = ("attention_out", "mlp_out", "block_out")
LEAST = 1e-12
"""The standard deviation that a constant channel enters with."""
RESOLUTION = 1e-7
"""A channel that varies by less than this share of its size is constant: float32 holds no more."""
Tokens = Literal["all", "first"]


@dataclass(frozen=True)
class FeatureEntropy(Question):
    """`feature_entropy`: of what a head hands to the output matrix (its z, over the head's own channels). Profiles, per
    layer: `feature_entropy_layer` of what attention and feed-forward part write and of the residual stream after the
    block [place, layer], and `constant_channels` [place, layer], how many of their channels don't vary.

    Samples are all tokens of the inputs, or each sequence's first (`tokens="first"`: a picture model's class token, the
    paper's choice; it wants hundreds of inputs)."""

    tokens: Tokens = "all"
    paper: ClassVar[Paper] = PAPER
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_tokens("FeatureEntropy(tokens=...)", self.tokens)

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "feature_entropy",
                "Feature entropy",
                "Sum, over the head's channels, of the log of their standard deviation over tokens.",
                "nats",
                "hands on something else at every token",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return None if self.streams(opened) else "blocks with one output matrix of attention and one last matrix each"

    def streams(self, opened: Opened) -> Sequence[str]:
        return [stream for stream in opened.streams if has_blocks(opened, stream)]

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        layers: dict[str, dict[str, list[xr.Dataset]]] = {}
        reading = HeadOutput(what="vector", per="head", queries="all" if self.tokens == "all" else (0,), name="z")
        with ExitStack() as stack, torch.no_grad():
            run = stack.enter_context(attend(opened, readings=[reading], segments=prompt.segments))
            for stream in self.streams(opened):
                layers[stream] = {place: [] for place in PLACES}
                looks = {p: keeping(found, self.tokens, prompt.inputs) for p, found in layers[stream].items()}
                stack.enter_context(hidden(opened, looks, stream=stream))
            opened.model(**prompt.inputs, **quiet(opened.model))
        found = {}
        for stream, places in layers.items():
            if stream not in run.tree.children:  # an input without pictures does not run the vision stream
                continue
            seen = run.tree[stream].to_dataset()
            # m2 / n from the standard error of the mean, sqrt(m2 / (n - 1) / n)
            variance = (seen["z_sem"] ** 2 * (seen["z_count"] - 1)).where(seen["z_count"] > 1, 0)
            data = {"z": seen["z"], "z_square": variance + seen["z"] ** 2, "z_count": seen["z_count"]}
            of_heads = xr.Dataset(data | {"z_square_count": seen["z_count"]}).rename(channel="head_channel")
            rows = [xr.concat(found, "layer", join="outer") for found in places.values()]
            features = xr.concat(rows, xr.IndexVariable("place", list(PLACES)), join="outer")
            found[stream] = of_heads.drop_vars("module").merge(features)
        return found

    def score(self, values: xr.Dataset) -> xr.DataArray:
        check_samples(values["z_count"].max())
        return channel_entropy(values["z"], values["z_square"], "head_channel")[0]

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        entropy, constant = channel_entropy(values["feature"], values["feature_square"])
        return {"feature_entropy_layer": entropy, "constant_channels": constant}


def transfer_entropy(
    opened: Opened,
    inputs: Sequence[Mapping[str, Any]],
    removed: Sequence[int] = (),
    tokens: Tokens = "first",
    stream: str | None = None,
) -> xr.DataArray:
    """TE_i [layer] in nats, for every layer that is not in `removed` (nan there): how far the entropy of the final
    features moves when the attention of layer i is replaced by the identity, given that `removed` is so already.

    `inputs` are encoded model inputs, one forward each for every layer. The identity adds the block's input once more,
    `x + x` in place of `x + Attn(LN(x))` (a plain skip is another network); so does it where a layer scale follows.
    Final features are the last block's output, normalised per token (mean 0, variance 1): a final norm's own weights
    add a constant that cancels. The reference entropy is that of the model without `removed`.
    """
    check_tokens("transfer_entropy(tokens=...)", tokens)
    layers = [block.layer for block in chosen_blocks(opened, None, stream)]
    wrong = sorted(set(removed) - set(layers))
    if wrong:
        raise HeadwiseError(f"removed: the model has layers 0 to {len(layers) - 1}; got {wrong}.")
    before = gaussian_entropy(final_features(opened, inputs, removed, tokens, stream))
    moved = [
        np.nan
        if layer in removed
        else abs(gaussian_entropy(final_features(opened, inputs, [*removed, layer], tokens, stream)) - before)
        for layer in layers
    ]
    return xr.DataArray(moved, {"layer": layers}, "layer", name="transfer_entropy")


def final_features(
    opened: Opened,
    inputs: Sequence[Mapping[str, Any]],
    removed: Sequence[int] = (),
    tokens: Tokens = "first",
    stream: str | None = None,
) -> Float[Tensor, "sample dim"]:
    """The normalised output of the last block, with the attentions of `removed` replaced by the identity."""
    found: list[Tensor] = []
    last = chosen_blocks(opened, None, stream)[-1].layer
    # The branch is silenced and its block given 2x: whatever scales the branch then scales a zero.
    identity: dict[str, Look] = {"block_in": lambda _, x: 2 * x, "attention_out": lambda _, x: torch.zeros_like(x)}
    for batch in inputs:

        def keep(_: int, x: Tensor, batch: Mapping[str, Any] = batch) -> None:
            found.append(F.layer_norm(samples(x, tokens, batch), x.shape[-1:]))

        with (
            hidden(opened, identity, removed, stream),
            hidden(opened, {"block_out": keep}, [last], stream),
            torch.no_grad(),
        ):
            opened.model(**batch, **quiet(opened.model))
    return torch.cat(found)


def gaussian_entropy(features: Float[Tensor, "sample channel"]) -> float:
    """`sum_j log sigma_j` in nats: features times c have c's log more for every channel that varies."""
    check_samples(len(features))
    x = xr.DataArray(features.detach().double().cpu().numpy(), dims=("sample", "channel"))
    return float(channel_entropy(x.mean("sample"), (x**2).mean("sample"))[0])


def channel_entropy(
    mean: xr.DataArray, square: xr.DataArray, channel: str = "channel"
) -> tuple[xr.DataArray, xr.DataArray]:
    """From the mean and the mean square of every channel: the entropy, and how many channels are constant."""
    variance = square - mean**2
    constant = variance <= RESOLUTION**2 * square
    sigma = np.sqrt(variance.where(~constant)).where(~constant, LEAST).where(mean.notnull())
    return np.log(sigma).sum(channel), constant.sum(channel)


def samples(x: Float[Tensor, "batch token dim"], tokens: Tokens, inputs: Mapping[str, Any]) -> Float[Tensor, "n dim"]:
    """The chosen tokens of a batch, padding left out."""
    if tokens == "first":
        return x[:, 0]
    mask = inputs.get("attention_mask")
    return x[mask.bool()] if isinstance(mask, Tensor) and mask.shape == x.shape[:2] else x.flatten(0, 1)


def keeping(found: list[xr.Dataset], tokens: Tokens, inputs: Mapping[str, Any]) -> Look:
    """Appends mean and mean square of every channel, layer by layer."""

    def look(layer: int, x: Tensor) -> None:
        rows = samples(x, tokens, inputs).double().cpu()
        moments = {"feature": rows.mean(0), "feature_square": rows.square().mean(0)}
        data = {name: ("channel", value.numpy()) for name, value in moments.items()}
        counts = {f"{name}_count": ("channel", np.full(rows.shape[1], len(rows))) for name in moments}
        coords = {"layer": layer, "channel": np.arange(rows.shape[1])}
        found.append(xr.Dataset(data | counts, coords))

    return look


def has_blocks(opened: Opened, stream: str) -> bool:
    """Whether every block of a stream has the matrices that `PLACES` are read at."""
    try:
        blocks = find_blocks(opened.model, opened.sites, stream)
    except HeadwiseError:  # a model that is no list of layers, which the caller then names as lacking
        return False
    return all(block.last is not None and block.site.out is not None for block in blocks)


def check_tokens(argument: str, tokens: str) -> None:
    if tokens not in ("all", "first"):
        raise HeadwiseError(f'{argument} must be "all" or "first"; got {tokens!r}.')


def check_samples(count: Any) -> None:
    if count < 2:
        raise HeadwiseError(f"Feature entropy wants at least 2 samples (tokens, or inputs with 'first'); got {count}.")
