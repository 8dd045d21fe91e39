"""Sinks after the first token: tokens that take on the direction of the first sink's hidden state, and lose it again.

With h_lt the hidden state of token t after layer l (embeddings left out, before the final norm) and b the primary sink
(of the first `candidates` tokens the one with the largest norm, averaged over layers), t is a sink in layer l when
`|cos(h_lt, h_lb)| > cosine`. Its level is the pair (first such layer, lifetime = how many such layers). Its score is
the mean attention `a_qt` of the later queries q > t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise.attention import At, Inputs, Received, attend
from headwise.attention.hidden import hidden
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import lacks_language_model, quiet
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.sinks import later_share

KINDS = ("primary", "secondary", "noise", "rest")
WHAT = ("hidden", "key", "value")
PROFILES = ("sink_levels", "sink_count", "sink_depth", "sink_norms", "primary_range")


@dataclass(frozen=True)
class SinkToken:
    """One token and the layers after which its hidden state points where the primary sink's does."""

    position: int
    kind: Literal["primary", "secondary", "noise"]
    layers: tuple[int, ...]

    @property
    def start(self) -> int:
        return self.layers[0]

    @property
    def lifetime(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class SecondarySinks(Question):
    """`secondary_sinks`: what a head gives to all secondary sinks of a text together, sum of their scores.

    `rule="share"`: primary-like from a lifetime of 70% of the primary sink's own, noise below 2 layers or 10% of it;
    `rule="layers"`: the paper's numbers for 30 to 64 layers, primary-like from L - 15, noise up to 4. `clip=True` looks
    only at the layers from the primary's largest jump in norm to its largest fall, as the paper's code does; False
    looks at all, as a model may raise its primary sink in two steps. `prominence`: a first token whose norm is never
    that many times the median of the others is no sink, and then nothing is (ours).

    Profiles, per text: `sink_levels` [start_layer, lifetime], how many tokens; `sink_count` [kind]; `sink_depth`
    [layer, kind], the scores averaged over heads and summed over the tokens of a kind; `sink_norms` [layer, kind, what]
    of hidden states (entering the layer), keys and values; `primary_range` [edge], the layers looked at. The kind
    "rest" are the tokens that are no sinks.
    """

    cosine: float = 0.9
    candidates: int = 2
    rule: Literal["share", "layers"] = "share"
    clip: bool = True
    prominence: float = 3.0
    others: int = 64
    paper: ClassVar[Paper] = Paper("On the Existence and Behaviour of Secondary Attention Sinks", "2512.22213")
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.cosine < 1:
            raise HeadwiseError(f"SecondarySinks(cosine=...) must lie between 0 and 1; got {self.cosine!r}.")
        if self.rule not in ("share", "layers"):
            raise HeadwiseError(f'SecondarySinks(rule=...) must be "share" or "layers"; got {self.rule!r}.')
        for name in ("candidates", "others"):
            if getattr(self, name) < 1:
                raise HeadwiseError(f"SecondarySinks({name}=...) must be at least 1 token; got {getattr(self, name)}.")

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                self.name,
                "Secondary sinks",
                "Attention to later tokens whose hidden state points where the first sink's does.",
                "share of attention",
                "rests on later sinks",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_language_model(opened)

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        mask = prompt.inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise HeadwiseError("SecondarySinks reads texts one by one, without padding: give them as single inputs.")
        norms, cosines = directions(opened, prompt.inputs, self.candidates)
        samples = [self.find(norms[:, row], cosines[:, row]) for row in range(norms.shape[1])]
        values = read(opened, prompt.inputs, samples, self.others, norms)
        seen = [_describe(values.isel(sample=row), *samples[row], norms[:, row]) for row in range(len(samples))]
        return {"text": xr.concat(seen, "sample").mean("sample")}

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {self.name: values["secondary"], f"{self.name}_sem": values["secondary_sem"]}

    def profiles(self, values: xr.Dataset) -> Mapping[str, xr.DataArray]:
        return {name: values[name] for name in PROFILES}

    def find(
        self, norms: Float[np.ndarray, "layer token"], cosines: Float[np.ndarray, "layer candidate token"]
    ) -> tuple[list[SinkToken], tuple[int, int]]:
        """The sink tokens of one text, the primary first (none at all if it does not stand out), and the layers
        [start, end) looked at."""
        layers, tokens = norms.shape
        primary = int(norms[:, : self.candidates].mean(0).argmax())
        rest = np.delete(norms, range(min(self.candidates, tokens - 1)), 1)
        start, end = lifespan(norms[:, primary]) if self.clip else (0, layers)
        if not (norms[:, primary] / np.median(rest, 1))[start:end].max() >= self.prominence:
            return [], (start, end)
        found = [SinkToken(primary, "primary", tuple(range(start, end)))]
        alive = np.abs(cosines[start:end, primary]) > self.cosine
        for position in range(max(self.candidates, primary + 1), tokens):
            where = tuple(int(layer) + start for layer in alive[:, position].nonzero()[0])
            if where:
                found.append(SinkToken(position, self.label(len(where), end - start, layers), where))
        return found, (start, end)

    def label(self, lifetime: int, span: int, layers: int) -> Literal["primary", "secondary", "noise"]:
        if self.rule == "layers":
            return "primary" if lifetime >= layers - 15 else "secondary" if lifetime > 4 else "noise"
        return "primary" if lifetime >= 0.7 * span else "noise" if lifetime < max(2, 0.1 * span) else "secondary"


def lifespan(norm: Float[np.ndarray, " layer"]) -> tuple[int, int]:
    """The layers [start, end) between the largest jump of a norm and its largest fall after that."""
    step = np.diff(norm)
    if not len(step):
        return 0, len(norm)
    start = int(step.argmax()) + 1
    return start, start + int(step[start:].argmin()) + 1 if start < len(step) else len(norm)


@torch.no_grad()
def directions(
    opened: Opened, inputs: Mapping[str, Any], candidates: int
) -> tuple[Float[np.ndarray, "layer sample token"], Float[np.ndarray, "layer sample candidate token"]]:
    """Norms of the hidden states after every layer, and their cosine with those of the first tokens."""
    norms: dict[int, Tensor] = {}
    cosines: dict[int, Tensor] = {}

    def look(layer: int, x: Tensor) -> None:
        x = x.float()
        norms[layer] = x.norm(dim=-1).cpu()
        cosines[layer] = torch.cosine_similarity(x[:, :candidates, None], x[:, None], dim=-1).cpu()

    with hidden(opened, {"block_out": look}):
        opened.model(**inputs, **quiet(opened.model))
    order = sorted(norms)
    return tuple(torch.stack([found[layer] for layer in order]).numpy() for found in (norms, cosines))  # type: ignore[return-value]


@torch.no_grad()
def read(
    opened: Opened,
    inputs: Mapping[str, Any],
    samples: Sequence[tuple[list[SinkToken], tuple[int, int]]],
    others: int,
    norms: Float[np.ndarray, "layer sample token"],
) -> xr.Dataset:
    """Scores of all tokens; keys and values of the sinks and of `others` evenly spread tokens."""
    spread = np.linspace(0, norms.shape[-1] - 1, min(others, norms.shape[-1])).astype(int)
    places = sorted({int(p) for p in spread} | {s.position for found, _ in samples for s in found})
    # Two runs of one forward pass: in one, keys and values would be padded to all the keys that scores are for.
    sums, sizes = [Received(stream="text"), At(lags=[0], stream="text")], [Inputs(("k", "v"), queries=places)]
    with attend(opened, readings=sums) as received, attend(opened, readings=sizes) as entering:
        opened.model(**inputs, **quiet(opened.model))
    size = np.sqrt((entering.tree["text"].to_dataset() ** 2).sum("channel")).rename(key="token")
    score = later_share(received.tree["text"].to_dataset())
    return xr.Dataset({"score": score, "key_norm": size["input_k"], "value_norm": size["input_v"]})


def _describe(
    values: xr.Dataset, found: list[SinkToken], span: tuple[int, int], norms: Float[np.ndarray, "layer token"]
) -> xr.Dataset:
    """One text's part of the score and the profiles."""
    layers, tokens = np.arange(len(norms)), np.arange(norms.shape[1])
    groups = {kind: [s.position for s in found if s.kind == kind] for kind in KINDS[:-1]}
    groups["rest"] = np.setdiff1d(tokens, [s.position for s in found]).tolist()
    levels = np.zeros((len(layers), len(layers)))
    for sink in found:
        levels[sink.start, sink.lifetime - 1] += sink.kind == "secondary"
    entering = xr.DataArray(norms[:-1], dims=("layer", "token"), coords={"layer": layers[1:], "token": tokens})
    sums, sizes = [], []
    for places in groups.values():
        sums.append(values["score"].isel(key=places).fillna(0).sum("key"))
        size = values[["key_norm", "value_norm"]].sel(token=np.intersect1d(places, values["token"])).mean("head")
        size = size.assign(hidden_norm=entering.sel(token=places)).mean("token")
        sizes.append(size.rename({f"{what}_norm": what for what in WHAT}).to_array("what").sel(what=list(WHAT)))
    names = {"kind": list(KINDS)}
    return xr.Dataset(
        {
            "secondary": sums[KINDS.index("secondary")],
            "sink_levels": (("start_layer", "lifetime"), levels),
            "sink_count": ("kind", [float(len(places)) for places in groups.values()]),
            "sink_depth": xr.concat([one.mean("head") for one in sums], "kind"),
            "sink_norms": xr.concat(sizes, "kind"),
            "primary_range": ("edge", [float(edge) if found else np.nan for edge in span]),
        },
        coords=names | {"start_layer": layers, "lifetime": layers + 1, "edge": ["start", "end"]},
    ).drop_vars("module", errors="ignore")
