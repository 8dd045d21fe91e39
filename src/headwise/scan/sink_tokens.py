"""Which tokens are sinks, and does a head do better without them: tables beside `SecondarySinks` and `SinkCensus`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import Received, Reweight, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.scan.needs import lacks_language_model, quiet
from headwise.scan.run import evaluating, make_prompts
from headwise.scan.secondary_sinks import SecondarySinks, directions, read
from headwise.scan.sink_census import SinkCensus
from headwise.scan.sinks import received_share

Heads = Sequence[tuple[int, int]]


def secondary_sink_tokens(
    opened: Opened,
    texts: str | Sequence[str] | None = None,
    inputs: Any = None,
    question: SecondarySinks | None = None,
) -> pd.DataFrame:
    """A row per sink token: text, position, token, kind, start, lifetime, layers, the norm of its hidden state after
    the first of them, and its score (mean attention of later queries, over these layers and all heads)."""
    asked = question or SecondarySinks()
    rows = []
    for number, batch in one_by_one(opened, asked.name, texts, inputs):
        norms, cosines = directions(opened, batch, asked.candidates)
        found, span = asked.find(norms[:, 0], cosines[:, 0])
        score = read(opened, batch, [(found, span)], asked.others, norms)["score"].isel(sample=0).mean("head")
        for sink in found:
            place = {"text": number, "position": sink.position, "token": token(opened, batch, sink.position)}
            about = {"kind": sink.kind, "start": sink.start, "lifetime": sink.lifetime, "layers": sink.layers}
            size = float(norms[sink.start, 0, sink.position])
            received = float(score.isel(key=sink.position).sel(layer=list(sink.layers)).mean())
            rows.append(place | about | {"norm": size, "score": received})
    columns = ["text", "position", "token", "kind", "start", "lifetime", "layers", "norm", "score"]
    return pd.DataFrame(rows, columns=columns)


def later_sink_tokens(
    opened: Opened, texts: str | Sequence[str] | None = None, inputs: Any = None, question: SinkCensus | None = None
) -> pd.DataFrame:
    """A row per later sink of a head: text, layer, head, position, token, mass (`m_k`); the largest mass first."""
    asked = question or SinkCensus()
    rows = []
    for number, batch in one_by_one(opened, asked.name, texts, inputs):
        values = census(opened, batch)
        share = received_share(values).isel(sample=0).where(asked.found(values).isel(sample=0))
        table = share.to_series().dropna().rename("mass").reset_index()
        rows.append(table.assign(text=number, token=[token(opened, batch, key) for key in table["key"]]))
    table = pd.concat(rows, ignore_index=True).rename(columns={"key": "position"})
    table = table.sort_values("mass", ascending=False, kind="stable", ignore_index=True)
    return table[["text", "layer", "head", "position", "token", "mass"]]


def sink_effects(
    opened: Opened,
    heads: Heads,
    texts: str | Sequence[str] | None = None,
    inputs: Any = None,
    question: SinkCensus | None = None,
    beta: float = 0.4,
    instead: Callable[[Float[np.ndarray, "key"], int], Sequence[int]] | None = None,
) -> pd.DataFrame:
    """Good and bad sinks: the change of the next-token loss when the later sinks of one head alone keep only `beta` of
    their attention and its other keys get the rest, in proportion (the paper's calibration).

    A row per head: layer, head, sinks (a text), change (nats, mean over the texts with sinks), sem, kind ("bad" where
    the loss falls by more than two standard errors, "good" where it rises so far, else "neutral"). A sink is bad when
    the head is better without it. `instead(m, count)` names other keys to weaken in their place: a control."""
    reason = lacks_language_model(opened)
    if reason is not None:
        raise HeadwiseError(f"sink_effects needs {reason}; {opened.name} does not have that.")
    if not 0 <= beta <= 1:
        raise HeadwiseError(f"sink_effects(beta=...) must lie between 0 and 1; got {beta!r}.")
    asked = question or SinkCensus()
    seen: dict[tuple[int, int], list[tuple[int, float]]] = {(int(layer), int(head)): [] for layer, head in heads}
    for _, batch in one_by_one(opened, asked.name, texts, inputs):
        values = census(opened, batch)
        share, sinks = received_share(values).isel(sample=0), asked.found(values).isel(sample=0)
        clean = loss(opened, batch)
        for layer, head in seen:
            places = np.flatnonzero(sinks.sel(layer=layer, head=head).values)
            if not len(places):
                continue
            number = len(places)
            if instead is not None:
                places = np.asarray(instead(share.sel(layer=layer, head=head).values, number))
            labels = torch.zeros(share.sizes["key"], dtype=torch.long)
            labels[torch.as_tensor(places)] = 1
            edit = Reweight(groups=("others", "later sinks"), rule=calibration(beta), heads=[(layer, head)])
            changed = loss(opened, batch, [edit], Segments(("others", "later sinks"), labels))
            seen[layer, head].append((number, changed - clean))
    rows = []
    for (layer, head), pairs in seen.items():
        change = np.array([c for _, c in pairs])
        sem = change.std(ddof=1) / np.sqrt(len(change)) if len(change) > 1 else np.nan
        mean = change.mean() if len(change) else np.nan
        kind = "neutral" if not abs(mean) > 2 * sem else "bad" if mean < 0 else "good"
        number = float(np.mean([n for n, _ in pairs])) if pairs else 0.0
        rows.append({"layer": layer, "head": head, "sinks": number, "change": mean, "sem": sem, "kind": kind})
    return pd.DataFrame(rows, columns=["layer", "head", "sinks", "change", "sem", "kind"])


def calibration(beta: float) -> Callable[[Tensor], Tensor]:
    """Weights of (others, sinks) from their masses: beta for sinks, `(1 - beta s) / (1 - s)` for others, so that rows
    still sum to 1; a row that sees sinks only stays as it is."""

    def rule(masses: Float[Tensor, "batch heads query group"]) -> Tensor:
        s = masses[..., 1]
        whole = s > 1 - 1e-6
        others = torch.where(whole, 1.0, (1 - beta * s) / (1 - s).clamp(min=1e-6))
        return torch.stack([others, torch.where(whole, 1.0, beta)], -1).to(masses.dtype)

    return rule


def one_by_one(
    opened: Opened, name: str, texts: str | Sequence[str] | None, inputs: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every text as a batch of its own, in evaluation mode and without gradients."""
    prompts = make_prompts(opened, texts, inputs, None)
    if not prompts:
        raise HeadwiseError(f"texts: {name} looks at the tokens of your texts; give texts=[...] or inputs=[...].")
    number = 0
    with evaluating(opened.model):
        for prompt in prompts:
            if "input_ids" not in prompt.inputs:
                raise HeadwiseError(f"inputs: {name} wants inputs with token ids; got {sorted(prompt.inputs)}.")
            for row in range(len(prompt.inputs["input_ids"])):
                yield number, {key: x[row : row + 1] for key, x in prompt.inputs.items()}
                number += 1


def census(opened: Opened, batch: dict[str, Any]) -> xr.Dataset:
    with attend(opened, readings=[Received(stream="text")]) as run:
        opened.model(**batch, **quiet(opened.model))
    return run.tree["text"].to_dataset().drop_vars("module")


def loss(opened: Opened, batch: dict[str, Any], edits: Sequence[Any] = (), segments: Segments | None = None) -> float:
    """Mean next-token loss in nats."""
    with attend(opened, edits=edits, segments=segments):
        logits = opened.model(**batch).logits
    return F.cross_entropy(logits[0, :-1].float(), batch["input_ids"][0, 1:]).item()


def token(opened: Opened, batch: dict[str, Any], position: int) -> str:
    number = int(batch["input_ids"][0, position])
    return str(number) if opened.tokenizer is None else str(opened.decode([number]))
