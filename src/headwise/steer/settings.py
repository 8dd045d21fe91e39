"""Settings of methods held against their annotations: the wrong kind is told in a sentence, when it is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.patterns import HeadPattern

Heads = Sequence[tuple[int, int]] | HeadPattern | None
"""(layer, head) pairs, or a pattern that a scan found (all of its heads); None stands for every head."""
NUMBERS = {float: Real, int: Integral}
WORDS = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a name",
    NoneType: "None",
    Callable: "a function",
    Heads: "(layer, head) pairs, a head pattern, or None for all",
}


def check_settings(method: Any) -> None:
    """Raises where a setting is not of the kind that the method's class says."""
    hints = annotations(type(method))
    for name in (field.name for field in fields(method) if field.name in hints):
        value = getattr(method, name)
        if not fits(value, hints[name]):
            given = (
                f"a tensor {value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            )
            raise HeadwiseError(f"{type(method).__name__}({name}=...) must be {said(hints[name])}; got {given}.")


@cache
def annotations(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # a class made inside a function, which may speak of names that only stand there
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a kind. Any collection will do for a tuple, and numbers of numpy for numbers."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin in (tuple, Sequence):
        if not isinstance(value, Collection) or isinstance(value, str | Mapping | Tensor):
            return False
        if origin is tuple and parts[-1] is not ...:
            return len(value) == len(parts) and all(map(fits, value, parts))
        return all(fits(one, parts[0]) for one in value)
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool)
    return callable(value) if origin is Callable else isinstance(value, hint)


def said(hint: Any) -> str:
    """A kind in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in WORDS or origin in WORDS:
        return WORDS[hint if hint in WORDS else origin]
    if origin in (Union, UnionType):
        return ", or ".join(said(part) for part in parts)
    if origin is Literal:
        return " or ".join(f'"{part}"' for part in parts)
    if origin in (tuple, Sequence):
        many = origin is Sequence or parts[-1] is ...
        return f"a list, each {said(parts[0])}" if many else f"({', '.join(map(said, parts))})"
    dims = getattr(hint, "dim_str", None)
    return hint.__name__ if dims is None else f"a tensor [{dims.replace(' ', ', ')}]"
