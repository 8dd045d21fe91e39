"""A steering recipe: methods with their settings, and the model they were made for. JSON, and safetensors for tensors.

Only methods of this package are made from a recipe, by name; nothing in it is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.models import Opened
from headwise.patterns import HeadPattern
from headwise.steer.catalogue import find
from headwise.steer.method import Method

FORMAT = "headwise steering recipe 1"


@dataclass(frozen=True)
class Recipe:
    """Methods in the order they are applied, for the model of this fingerprint."""

    methods: tuple[Method, ...]
    model: str
    fingerprint: str

    def __post_init__(self) -> None:
        if not self.methods or not all(isinstance(method, Method) for method in self.methods):
            raise HeadwiseError(f"A recipe wants one or more steering methods; got {self.methods!r}.")

    @classmethod
    def of(cls, opened: Opened, *methods: Method) -> Recipe:
        return cls(methods, opened.name, opened.fingerprint)

    def check(self, opened: Opened) -> None:
        """Raises where the recipe was made for another model."""
        if opened.fingerprint != self.fingerprint:
            raise HeadwiseError(
                f"The recipe was made for {self.model} ({self.fingerprint}), not for {opened.name} "
                f"({opened.fingerprint}): calibrate its methods on this model."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """`path` (.json); tensors go to a file of the same name in .safetensors beside it."""
        path = Path(path)
        if path.suffix != ".json":
            raise HeadwiseError(f"save: wanted a name that ends in .json; got {str(path)!r}.")
        tensors: dict[str, Tensor] = {}
        rows = []
        for n, method in enumerate(self.methods):
            settings = {f.name: plain(getattr(method, f.name), f"{n}.{f.name}", tensors) for f in fields(method)}
            rows.append({"method": type(method).__name__, "settings": settings})
        about = {"format": FORMAT, "headwise": version("headwise"), "model": self.model}
        content = json.dumps(about | {"fingerprint": self.fingerprint, "methods": rows}, indent=1)
        if tensors:
            with replacing(path.with_suffix(".safetensors")) as unfinished:
                save_file(tensors, unfinished)
        with replacing(path) as unfinished:
            unfinished.write_text(content + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        path = Path(path)
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise HeadwiseError(f"load: {path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            raise HeadwiseError(f"load: {path} is not JSON ({error}).") from None
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise HeadwiseError(f"load: {path} is not a steering recipe of this version of headwise.")
        beside = path.with_suffix(".safetensors")
        try:
            tensors = load_file(beside) if beside.exists() else {}
            methods = [find(row["method"])(**restored(row["settings"], tensors)) for row in given["methods"]]
            return cls(tuple(methods), given["model"], given["fingerprint"])
        except (KeyError, TypeError, AttributeError, SafetensorError, ValidationError) as error:
            raise HeadwiseError(f"load: {path} is damaged ({type(error).__name__}: {error}).") from None


def plain(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A setting as JSON; a tensor is put aside under `key`."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Tensor):
        tensors[key] = value.detach().cpu().contiguous()
        return {"tensor": key}
    if isinstance(value, HeadPattern):
        return {"pattern": value.model_dump()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {"map": [[plain(k, key, tensors), plain(v, f"{key}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, Sequence):
        return [plain(v, f"{key}.{n}", tensors) for n, v in enumerate(value)]
    raise HeadwiseError(f"save: the setting {key} is a {type(value).__name__}, which a recipe cannot hold.")


def restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The settings of one method, from JSON."""
    return {name: back(setting, tensors) for name, setting in value.items()}


def back(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(back(v, tensors) for v in value)
    if isinstance(value, dict):
        if "tensor" in value:
            if value["tensor"] not in tensors:
                raise HeadwiseError(
                    f"load: the tensor {value['tensor']} is missing: keep the recipe's .safetensors file beside it."
                )
            return tensors[value["tensor"]]
        if "pattern" in value:
            return HeadPattern.model_validate(value["pattern"])
        return {back(k, tensors): back(v, tensors) for k, v in value["map"]}
    return value
