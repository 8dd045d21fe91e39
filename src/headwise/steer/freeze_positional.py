"""Heads frozen to their positions: weights from a table, whatever queries and keys say.

`a_ij = softmax_j(T_h[i - j])` over the keys that i sees. The table is the log of a head's mean attention on calibration
texts; what a text holds enters by its values alone, as in the paper's positional attention, which is trained so.

Row i sees offsets 0 to i, so the plain mean over rows is not the table of even a head that is positional. Let `M_d` be
the sum, over the rows of all texts, of the weight at offset d, and `N_d` the weight at offsets up to d of the rows
i >= d. `r_d = M_d / N_d` is the share of d among the offsets up to d, and `T[d] = log r_d + sum_{e > d} log(1 - r_e)`:
the maximum-likelihood table for rows cut short, in closed form (Lynden-Bell's estimator of truncated samples). It needs
offset sums only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attention import Edit, Recompute, ScoreMap, attend
from headwise.attention.call import AttentionCall
from headwise.attention.dense import weighed
from headwise.attention.effects import resolve
from headwise.attention.once import on
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, every_head, pairs
from headwise.steer.prompts import padded_left

TINY = 1e-30
"""Stands for a weight, or a share, that is 0: its log has to be a number."""
UNSEEN = -1e30
"""The score of an offset that no text had: no weight."""
Text = str | Int[Tensor, " token"]


@dataclass(frozen=True, eq=False)
class Table:
    """One head's scores: by offset, and if given, by place for the first queries."""

    offsets: Float[Tensor, " offset"]
    places: Float[Tensor, "query key"] | None = None

    def __call__(self, s: Tensor, i: Tensor, j: Tensor) -> Tensor:
        lag, most = i - j, len(self.offsets) - 1
        found = on(self.offsets, s.device)[lag.clamp(0, most)].to(s.dtype).masked_fill(lag > most, UNSEEN)
        if self.places is not None:
            own = on(self.places, s.device)[i.clamp(max=most), j.clamp(max=most)].to(s.dtype)
            found = torch.where(i <= most, own, found)
        return found.expand_as(s)


@dataclass(frozen=True, eq=False)
class FreezeToPositional(Method):
    """Freezes `heads` (None: all) to the tables of `calibrate`, one a head in the heads' order.

    `by="offset"`: one number an offset; offsets that no text had get no weight, so a head looks back as far as the
    longest text did. `by="place"`: one number a pair of query and key, exactly the mean attention; queries past the
    longest text go by offset. It keeps a matrix a head, and counts places from the batch's first column, so that a
    batch padded on the left is refused. A soft cap and position biases of the model's own are part of what is
    replaced; masks and windows stay."""

    heads: Heads = None
    by: Literal["offset", "place"] = "offset"
    offsets: Float[Tensor, "head offset"] | None = None
    places: Float[Tensor, "head query key"] | None = None
    what: ClassVar[str] = "heads whose weights depend on positions only"
    paper: ClassVar[Paper] = Paper(
        "Positional Attention: Expressivity and Learnability of Algorithmic Computation", "2410.01686"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("offsets", "places"):
            given = getattr(self, name)
            if given is not None and not (given.numel() and given.isfinite().all()):
                raise HeadwiseError(
                    f"FreezeToPositional({name}=...) must hold finite numbers; got shape {tuple(given.shape)}."
                )
        if self.places is not None and self.offsets is not None:
            heads, most = self.offsets.shape
            if self.places.shape != (heads, most, most):
                raise HeadwiseError(
                    f"FreezeToPositional(places=...) must be [{heads}, {most}, {most}], as offsets= are "
                    f"[{heads}, {most}]; got shape {tuple(self.places.shape)}."
                )

    def chosen(self, opened: Opened) -> list[tuple[int, int]]:
        return list(dict.fromkeys(pairs(self.heads, opened) or every_head(opened)))

    def tables(self, opened: Opened) -> dict[tuple[int, int], Table]:
        """The table of every frozen head."""
        chosen = self.chosen(opened)
        if self.offsets is None or (self.by == "place" and self.places is None):
            raise HeadwiseError("FreezeToPositional has no tables yet: call calibrate(opened, texts).")
        if len(self.offsets) != len(chosen):
            raise HeadwiseError(
                f"FreezeToPositional(offsets=...) holds tables for {len(self.offsets)} heads, but {len(chosen)} are "
                "frozen: calibrate them again."
            )
        places = self.places if self.by == "place" and self.places is not None else [None] * len(chosen)
        return {pair: Table(*both) for pair, both in zip(chosen, zip(self.offsets, places, strict=True), strict=True)}

    def edits(self, opened: Opened) -> list[Edit]:
        return [ScoreMap(table, placed=True, heads=[pair]) for pair, table in self.tables(opened).items()]

    @contextmanager
    def hooks(self, opened: Opened) -> Iterator[None]:
        if self.by == "offset":
            yield
            return
        handle = opened.model.register_forward_pre_hook(check_places, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def calibrate(self, opened: Opened, texts: Sequence[Text]) -> Self:
        """A copy with tables of the heads' mean attention on these texts (strings, or their token ids)."""
        rows = encoded(opened, texts)
        lengths, chosen = torch.tensor([len(ids) for ids in rows]), self.chosen(opened)
        place, most = {pair: n for n, pair in enumerate(chosen)}, int(lengths.max())
        sums = torch.zeros(len(chosen), most, dtype=torch.float64)
        maps = torch.zeros(len(chosen), most, most, dtype=torch.float64) if self.by == "place" else None

        def add(pair: tuple[int, int], a: Tensor, call: AttentionCall) -> None:
            n, size = place[pair], len(a)
            where = torch.arange(size)
            sums[n].index_add_(0, (where[:, None] - where).clamp(min=0).flatten(), a.flatten())
            if maps is not None:
                maps[n, :size, :size] += a

        look(opened, chosen, rows, add)
        longer = (lengths[:, None] > torch.arange(most)).sum(0)
        means = None if maps is None else (maps / longer[:, None]).clamp(min=TINY).log().float()
        return replace(self, offsets=by_offset(sums, lengths).float(), places=means)

    def overlap(self, opened: Opened, texts: Sequence[Text]) -> Float[Tensor, " head"]:
        """How positional the frozen heads are: the mean over queries of `sum_j min(a_ij, frozen a_ij)`, 1 where
        freezing changes nothing."""
        tables, found = self.tables(opened), []

        def compare(pair: tuple[int, int], a: Tensor, call: AttentionCall) -> None:
            frozen = weighed(resolve(call, [(ScoreMap(tables[pair], placed=True), [0])]), torch.float64).a[0, 0].cpu()
            found.append((pair, torch.minimum(a, frozen).sum(-1)))

        look(opened, list(tables), encoded(opened, texts), compare)
        return torch.stack([torch.cat([kept for at, kept in found if at == pair]).mean() for pair in tables])


def by_offset(sums: Float[Tensor, "head offset"], lengths: Int[Tensor, " text"]) -> Float[Tensor, "head offset"]:
    """Log weights from each offset's sum over the rows of texts of these lengths; the largest is 0."""
    offset = torch.arange(sums.shape[1])
    shorter = torch.minimum(offset, lengths[:, None]).sum(0)  # rows that do not reach an offset, each of weight 1
    within = (sums.cumsum(1) - shorter).clamp(min=TINY)
    share = (sums / within).clamp(TINY, 1)
    others = ((within - sums) / within).clamp(min=TINY).log()
    beyond = others.flip(1).cumsum(1).flip(1) - others
    table = share.log() + beyond
    return table - table.amax(1, keepdim=True)


def look(
    opened: Opened,
    chosen: Sequence[tuple[int, int]],
    rows: Sequence[Int[Tensor, " token"]],
    take: Callable[[tuple[int, int], Float[Tensor, "query key"], AttentionCall], None],
) -> None:
    """Gives `take` the weights of one head after the other, on one text after the other."""

    def head_by_head(call: AttentionCall) -> None:
        assert call.site is not None
        layer = call.site.layer
        for head in (h for at, h in chosen if at == layer):
            one = call.select(heads=[head])
            a = weighed(resolve(one, []), torch.float64).a[0, 0].cpu()
            if a.shape[0] != a.shape[1] or a.triu(1).any() or (a.sum(-1) - 1).abs().max() > 1e-3:
                raise HeadwiseError(
                    f"FreezeToPositional wants heads that share all their attention out among the tokens so far; head "
                    f"{head} of layer {layer} of {opened.name} sees later tokens, or has a sink beside them."
                )
            take((layer, head), a, call=one)

    layers = sorted({layer for layer, _ in chosen})
    with attend(opened, edits=[Recompute(head_by_head, layer=layers)]), torch.no_grad():
        for ids in rows:
            opened.model(input_ids=ids[None].to(opened.device))


def encoded(opened: Opened, texts: Sequence[Text]) -> list[Int[Tensor, " token"]]:
    """The texts' token ids."""
    if isinstance(texts, str) or not len(texts):
        raise HeadwiseError(f"texts: wanted one or more texts to calibrate on, as strings or token ids; got {texts!r}.")
    rows = [opened.encode(text)["input_ids"][0] if isinstance(text, str) else text for text in texts]
    for ids in rows:
        if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point() or not len(ids):
            raise HeadwiseError(f"texts: wanted strings or token ids [token]; got {ids!r}.")
    return rows


def check_places(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook: refuses a batch whose places are not counted from its first column."""
    if padded_left(args, kwargs):
        raise HeadwiseError(
            'FreezeToPositional(by="place") counts places from the first column, but this batch is padded on the left: '
            'use by="offset".'
        )
