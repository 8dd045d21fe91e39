"""Mechanisms with settings, as the swap bench is told them in one word.

attention                                  a name that `headwise swap list` shows
attention:position=Rope:qk_norm=true       settings after colons, values as JSON has them; other words are names
attention:normaliser=Entmax(2.0)           a part, by its class in `headwise.swap`, with its arguments
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headwise import swap
from headwise.errors import HeadwiseError

BASELINE = "attention"
"""Softmax attention as it is made without settings."""
SMALL = {"dual_attention": "symbols=relative", "fixed_head_attention": "head_dim=32", "triadic_attention": "topk=6"}
"""Settings under "all" where the defaults are made for larger models: they alone would have more parameters than the
bench's models, or keep more tokens than a task has."""
PARTS = {"score": swap.Score, "normaliser": swap.Normaliser, "position": swap.Position}
NUMBERS: dict[str, Any] = {"bool": bool, "int": int, "float": int | float}
Wanted = str | type[swap.Mechanism]


@dataclass(frozen=True)
class Spec:
    """One mechanism with its settings."""

    label: str
    kind: type[swap.Mechanism]
    settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, wanted: Wanted) -> Spec:
        """From a word of the command line, or a class (one's own, too: importable, for `jobs`)."""
        if isinstance(wanted, type) and issubclass(wanted, swap.Mechanism):
            return cls(wanted.key(), wanted)
        name, *rest = split(wanted, ":")
        if name not in swap.MECHANISMS:
            raise HeadwiseError(f"mechanisms: one of {', '.join(swap.MECHANISMS)}; got {name!r}.")
        settings = tuple(tuple(part.partition("=")[::2]) for part in rest)
        if not all(key.isidentifier() and value for key, value in settings):
            raise HeadwiseError(f"mechanisms: wanted name:setting=value:setting=value; got {wanted!r}.")
        return cls(wanted, swap.MECHANISMS[name], settings)

    def make(self, dim: int, heads: int, causal: bool) -> swap.Mechanism:
        own = {key: value_of(text) for key, text in self.settings}  # new parts for every layer
        for key, value in own.items():
            if key in PARTS and isinstance(value, torch.nn.Module) and not isinstance(value, PARTS[key]):
                raise HeadwiseError(f"mechanisms: {type(value).__name__} is no {key} in {self.label!r}.")
            wanted = numbers_of(self.kind).get(key)
            if wanted and not any(is_number(value, kind) for kind in wanted):
                raise HeadwiseError(f"mechanisms: {key} wants {' or '.join(wanted)} in {self.label!r}; got {value!r}.")
        try:
            return self.kind(dim, heads, causal=causal, **own)
        except HeadwiseError:
            raise
        except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            raise HeadwiseError(f"mechanisms: {self.label!r} can't be made: {error}.") from None


def numbers_of(kind: type[swap.Mechanism]) -> dict[str, list[str]]:
    """The settings that are numbers or yes or no, and which of these they are."""
    found: dict[str, list[str]] = {}
    for cls in (cls for cls in reversed(kind.__mro__) if "__init__" in vars(cls) and issubclass(cls, swap.Mechanism)):
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            parts = str(parameter.annotation).split(" | ")
            if set(parts) <= {*NUMBERS, "None"}:
                found[name] = parts
    return found


def is_number(value: Any, kind: str) -> bool:
    if kind == "None":
        return value is None
    return isinstance(value, NUMBERS[kind]) and isinstance(value, bool) == (kind == "bool") and abs(value) < math.inf


def specs_of(mechanisms: str | Sequence[Wanted]) -> list[Spec]:
    """All of them, softmax attention first. A string is a list with commas; "all" means every one there is, three of
    them at a size that fits (`SMALL`)."""
    if mechanisms == "all":
        mechanisms = [f"{name}:{SMALL[name]}" if name in SMALL else name for name in swap.MECHANISMS]
    elif isinstance(mechanisms, str):
        mechanisms = split(mechanisms, ",")
    if not mechanisms:
        raise HeadwiseError("mechanisms: names, or all; got none.")
    specs = {spec.label: spec for spec in map(Spec.of, [BASELINE, *mechanisms])}
    return list(specs.values())


def split(text: str, separator: str) -> list[str]:
    """At separators outside of brackets.

    >>> split("a:b=C(1, 2),d", ",")
    ['a:b=C(1, 2)', 'd']
    """
    return [part.strip() for part in re.split(rf"{separator}(?![^(\[]*[)\]])", text) if part.strip()]


def value_of(text: str) -> Any:
    """A value as JSON has it, a part of the swap room, or a word."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    name, _, arguments = text.partition("(")
    kind = getattr(swap, name, None)
    if not (isinstance(kind, type) and issubclass(kind, swap.Score | swap.Normaliser | swap.Position)):
        return text
    try:
        call = ast.parse(text if arguments else f"{text}()", mode="eval").body
        assert isinstance(call, ast.Call)
        given = [ast.literal_eval(a) for a in call.args]
        return kind(*given, **{k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg})
    except (SyntaxError, ValueError, TypeError) as error:
        raise HeadwiseError(f"mechanisms: the part {text!r} can't be made: {error}.") from None
