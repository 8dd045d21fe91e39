"""Reading CTranslate2's `model.bin`: a list of named arrays."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from headwise.errors import HeadwiseError

VERSION = 6
DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read(path: Path) -> dict[str, np.ndarray]:
    """Every variable of the file, under its name and its aliases."""
    try:
        with path.open("rb") as stream:
            version = number(stream, "I")
            if version != VERSION:
                raise HeadwiseError(f"{path} is CTranslate2 format {version}; headwise reads format {VERSION}.")
            text(stream)  # the name of the model's specification
            number(stream, "I")  # and its revision
            found = {}
            for _ in range(number(stream, "I")):
                name = text(stream)
                shape = [number(stream, "I") for _ in range(number(stream, "B"))]
                dtype = DTYPES[number(stream, "B")]
                found[name] = np.frombuffer(exactly(stream, number(stream, "I")), dtype).reshape(shape)
            for _ in range(number(stream, "I")):
                alias = text(stream)
                found[alias] = found[text(stream)]
    except (struct.error, EOFError, ValueError, KeyError) as error:
        if isinstance(error, HeadwiseError):
            raise
        raise HeadwiseError(f"{path} is not a whole CTranslate2 model: fetch it again.") from error
    return found


def number(stream: BinaryIO, kind: str) -> int:
    return struct.unpack(f"<{kind}", exactly(stream, struct.calcsize(kind)))[0]


def text(stream: BinaryIO) -> str:
    return exactly(stream, number(stream, "H")).rstrip(b"\0").decode()


def exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data
