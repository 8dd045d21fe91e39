"""How alike are the attention maps of two heads, in one model or in two? (Kheir et al., 2024.)

For heads a and b with rows A_i, B_i over the same n units (tokens or words):

- "fro": `1 - mean over inputs of ||A - B||_F`. It falls with the length of the input and may be negative.
- "pearson": the mean over rows of the correlation of A_i and B_i over all keys; a row that is constant counts as 0.
- "pearson_nz": the same over the keys where both are non-zero, which takes out what a causal mask alone makes alike; a
  row with fewer than two such keys counts as 0.
- "js": `1 - mean over rows of JS(A_i, B_i)`, the Jensen-Shannon divergence in nats, so between 1 - log 2 and 1.

Equal heads have 1. The released code divides a biased covariance by unbiased deviations and so gives (n-1)/n; here both
are biased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.maps import map_rows, token_count
from headwise.scan.run import evaluating
from headwise.scan.units import Unit, Units, encode_one, find_units, main_stream

PAPER = Paper("Speech Representation Analysis based on Inter- and Intra-Model Similarities", "2406.16099")
Rows = Float[Tensor, "head row unit"]
Pairs = Float[Tensor, "head_a head_b"]
FLAT = 1e-6
"""A row whose deviations are smaller than this share of it is constant."""


def head_similarity(
    model_a: Opened,
    model_b: Opened,
    inputs: Sequence[Any],
    method: str = "js",
    unit: Unit = "token",
    stream: str | None = None,
    queries: int | str = 64,
    seed: int = 0,
) -> xr.DataArray:
    """Similarity of every head of `model_a` to every head of `model_b` (which may be the same one), with dims
    layer_a, head_a, layer_b, head_b; the method, unit and models stand in its attrs.

    `inputs` is a list of texts, pictures or sounds. `unit="word"` compares the maps between words, for models that
    split them differently; rows are divided by their sum. `queries` rows of each input are compared, drawn at random,
    or "all". Two models are asked about the same stream (None: the text, or the model's first).

    The maps of both are held for one block of rows at a time. Raises HeadwiseError where the two models have different
    units.

    >>> head_similarity(opened, opened, ["The cat sat on the mat."]).sel(layer_a=0, head_a=1).argmax(...)
    """
    if method not in METHODS:
        raise HeadwiseError(f"method: wanted one of {', '.join(METHODS)}; got {method!r}.")
    if not inputs or isinstance(inputs, str):
        raise HeadwiseError(f"inputs: wanted a list of texts, pictures or sounds; got {inputs!r}.")
    if queries != "all" and (not isinstance(queries, int) or queries < 1):
        raise HeadwiseError(f'queries: wanted "all" or how many rows of each input; got {queries!r}.')
    models = [model_a] if model_a is model_b else [model_a, model_b]
    total, weight = 0.0, 0
    sizes: list[tuple[int, ...]] = []
    for number, given in enumerate(inputs):
        parts, rows, units = 0.0, 0, 0
        with evaluating(model_a.model), evaluating(model_b.model):
            for blocks in paired_rows(models, given, unit, stream, queries, seed + number):
                sizes = [tuple(b.shape[:2]) for b in (blocks[0], blocks[-1])]
                units = blocks[0].shape[3]
                flat = [b.flatten(0, 1).double() for b in blocks]
                parts = parts + METHODS[method](flat[0], flat[-1])
                rows += blocks[0].shape[2]
        if method == "fro":  # the norm of the whole map, from the rows read
            total, weight = total + (parts * units / rows).sqrt(), weight + 1
        else:
            total, weight = total + parts, weight + rows
    mean = total / weight
    value = mean if method.startswith("pearson") else 1 - mean
    (la, ha), (lb, hb) = sizes
    return xr.DataArray(
        value.reshape(la, ha, lb, hb).numpy(),
        dims=("layer_a", "head_a", "layer_b", "head_b"),
        coords={"layer_a": range(la), "head_a": range(ha), "layer_b": range(lb), "head_b": range(hb)},
        attrs={"method": method, "unit": unit, "model_a": model_a.name, "model_b": model_b.name},
        name="similarity",
    )


def paired_rows(
    models: Sequence[Opened], given: Any, unit: Unit, stream: str | None, queries: int | str, seed: int
) -> Iterator[list[Float[Tensor, "layer head row unit"]]]:
    """The maps of every model for the same rows of one input, block by block."""
    batches = [encode_one(m, given) for m in models]
    streams = [main_stream(m, b, stream) for m, b in zip(models, batches, strict=True)]
    units = [find_units(m, given, token_count(m, b, s), unit) for m, b, s in zip(models, batches, streams, strict=True)]
    same_units(models, units, batches, unit)
    rows = draw(units[0].count, queries, seed)
    readers = [map_rows(m, b, u, rows, s) for m, b, u, s in zip(models, batches, units, streams, strict=True)]
    for blocks in zip(*readers, strict=True):
        # What goes to tokens of no unit (special ones, a sound's padding) is left out, and the rest shared out again.
        yield [b / b.sum(-1, keepdim=True).clamp(min=1e-12) for b in blocks]


def same_units(models: Sequence[Opened], units: Sequence[Units], batches: Sequence[dict], unit: Unit) -> None:
    a, b = units[0], units[-1]
    ids = [batch.get("input_ids") for batch in batches]
    known = all(x is not None for x in ids) and a.count == b.count
    if a.count != b.count or (unit == "token" and known and not torch.equal(ids[0].cpu(), ids[-1].cpu())):
        hint = "; compare them with unit='word'" if ids[0] is not None else ""
        raise HeadwiseError(
            f"inputs: {models[0].name} and {models[-1].name} do not read the same tokens of an input ({a.count} and "
            f"{b.count}){hint}."
        )


def draw(count: int, queries: int | str, seed: int) -> Int[Tensor, " row"]:
    """All rows, or as many random ones, in order."""
    if queries == "all" or int(queries) >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: int(queries)].sort().values


def squared_distance(a: Rows, b: Rows) -> Pairs:
    """`sum over rows of |A_i - B_i|^2`."""
    a, b = a.flatten(1), b.flatten(1)
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def pearson(a: Rows, b: Rows) -> Pairs:
    """`sum over rows of corr(A_i, B_i)`."""
    return standard(a).flatten(1) @ standard(b).flatten(1).T


def standard(x: Rows) -> Rows:
    """Rows with mean 0 and norm 1; constant rows (to the precision of a forward pass) become 0."""
    size = x.norm(dim=-1, keepdim=True)
    x = x - x.mean(-1, keepdim=True)
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > FLAT * size, x / norm, 0.0)


def pearson_nonzero(a: Rows, b: Rows) -> Pairs:
    """The same over keys where both are non-zero, from five products of matrices a row."""
    total = a.new_zeros(len(a), len(b))
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):
        in_x, in_y = (x != 0).to(x.dtype), (y != 0).to(y.dtype)
        count = (in_x @ in_y.T).clamp(min=1)
        mean_x, mean_y = x @ in_y.T / count, in_x @ y.T / count
        square_x, square_y = x**2 @ in_y.T / count, in_x @ (y**2).T / count
        var_x, var_y = square_x - mean_x**2, square_y - mean_y**2
        varied = (var_x > FLAT**2 * square_x) & (var_y > FLAT**2 * square_y)
        total += torch.where(varied, (x @ y.T / count - mean_x * mean_y) / (var_x * var_y).sqrt(), 0.0)
    return total


def jensen_shannon(a: Rows, b: Rows) -> Pairs:
    """`sum over rows of JS(A_i, B_i) = H((A_i + B_i) / 2) - (H(A_i) + H(B_i)) / 2`, in nats."""
    same = a is b
    total = a.new_zeros(len(a), len(b))
    a, b = a.float(), b.float()
    entropy_a, entropy_b = entropy(a), entropy(b)
    for n, head in enumerate(a):
        first = n if same else 0  # one model with itself: half of the pairs say all
        total[n, first:] = entropy((head + b[first:]) / 2) - (entropy_a[n] + entropy_b[first:]) / 2
    if same:
        total = total.triu() + total.triu(1).T
    return total.clamp(min=0)


def entropy(x: Rows) -> Float[Tensor, " head"]:
    """The entropies of all rows added up (three times as fast as torch.special.entr)."""
    return -(x * (x + 1e-30).log()).sum(-1).sum(-1, dtype=torch.float64)


METHODS: dict[str, Callable[[Rows, Rows], Pairs]] = {
    "fro": squared_distance,
    "pearson": pearson,
    "pearson_nz": pearson_nonzero,
    "js": jensen_shannon,
}


def layer_matches(similarity: xr.DataArray) -> xr.DataArray:
    """`mean over heads a of max over heads b`, as [layer_a, layer_b]: how well a layer's heads are found in another.

    A mean of maxima is biased upward where b has many heads: compare with heads of shuffled rows or another model's."""
    return similarity.max("head_b").mean("head_a")
