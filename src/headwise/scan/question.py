"""What a question is: which readings it wants, over which inputs, and how these become one score per head.

A question is a frozen dataclass. The usual one declares `readings` and turns the values into a `score`:

    @dataclass(frozen=True)
    class Sharpness(Question):
        paper = Paper("The exact title", "1234.56789")
        title, what, unit, higher = "Sharpness", "Mean of the largest weight", "share of attention", "looks at one
        token"

        def readings(self, opened):
            return [Top(1, per="head")]

        def score(self, values):                        # values: xarray, dims layer, head (+ rank, segment, ...)
            return values["top_value"].sel(rank=0)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import xarray as xr
from torch import Tensor

from headwise.paper import Paper

if TYPE_CHECKING:
    from headwise.attention.readings import Reading
    from headwise.models import Opened, Segments


@dataclass(frozen=True, eq=False)
class Prompt:
    """One input of the model. `own` holds what the question that made it needs to read its values again."""

    inputs: dict[str, Any]
    segments: dict[str, Segments] | None = None
    own: Any = None

    @property
    def length(self) -> int:
        """How many tokens a sample has at most: those of the ids, the steps of a sound, the patches of a picture (as if
        each were 16 x 16)."""
        ids = self.inputs.get("input_ids")
        if isinstance(ids, Tensor):
            return ids.shape[-1]
        shapes = [v.shape[1:] for v in self.inputs.values() if isinstance(v, Tensor)]
        return max((max(1, s[-1] * s[-2] // 256) if len(s) == 3 else max(s, default=1) for s in shapes), default=1)

    @property
    def tokens(self) -> int:
        """About how many tokens the model reads."""
        batch = next((len(v) for v in self.inputs.values() if isinstance(v, Tensor) and v.ndim), 1)
        return batch * self.length


@dataclass(frozen=True)
class Column:
    """One column of the table of heads, as the report explains it."""

    name: str
    title: str
    what: str
    unit: str
    higher: str
    threshold: float | None = None


@dataclass(frozen=True)
class Question:
    """Base of all questions. A subclass gives `paper`, the texts for the report, `readings` and `score`."""

    paper: ClassVar[Paper] = Paper("", "")
    title: ClassVar[str] = ""
    what: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    higher: ClassVar[str] = ""
    threshold: ClassVar[float | None] = None
    drives: ClassVar[bool] = False
    """Whether the question runs the model itself (`observe`), because one forward pass is not enough."""

    @property
    def name(self) -> str:
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def columns(self) -> tuple[Column, ...]:
        """What `score` returns; the first column bears the question's name."""
        return (Column(self.name, self.title or self.name, self.what, self.unit, self.higher, self.threshold),)

    def lacks(self, opened: Opened) -> str | None:
        """What the model would need for this question ("a causal language model"), or None when it has it."""
        return None

    def streams(self, opened: Opened) -> Sequence[str]:
        """The streams the question is asked of."""
        return list(dict.fromkeys(site.stream for site in opened.sites))

    def prompts(self, opened: Opened) -> list[Prompt] | None:
        """The question's own inputs; None = the caller's texts or inputs."""
        return None

    def readings(self, opened: Opened) -> list[Reading]:
        """What to read during the forward pass."""
        return []

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        """The same, where it depends on the tokens of the prompt."""
        return self.readings(opened)

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        """For `drives = True`: runs the model on one prompt and returns what it saw, per stream."""
        return {}

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        """Brings the values of one prompt and stream to dims that all prompts share; these are then averaged."""
        return values

    def score(self, values: xr.Dataset) -> xr.DataArray | Mapping[str, xr.DataArray]:
        """One score per layer and head, or several by column name; `<column>_sem` holds a standard error."""
        raise TypeError(f"{type(self).__name__} must define score(values).")

    def profiles(self, values: xr.Dataset) -> Mapping[str, xr.DataArray]:
        """Curves and tables beside the scores, by name, with dims of the question's own (and layer, head where they are
        per head). Kept in `Scan.data`, not in the table of heads; a dim of that name means the same everywhere."""
        return {}
