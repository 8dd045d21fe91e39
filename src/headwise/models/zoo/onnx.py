"""Just enough of the ONNX format to take weights out of a file: its tensors, and which node multiplies by which.

An ONNX file is a protobuf message; only the fields below are looked at, everything else is stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headwise.errors import HeadwiseError

GRAPH, NODE, INITIALIZER = 7, 1, 5
NODE_INPUT, NODE_NAME, NODE_KIND = 1, 3, 4
DIMS, DATA_TYPE, FLOATS, NAME, RAW = 1, 2, 4, 8, 9
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    7: np.dtype("<i8"),
    6: np.dtype("<i4"),
    9: np.dtype("?"),
    10: np.dtype("<f2"),
}


@dataclass(frozen=True)
class Node:
    name: str
    kind: str
    inputs: tuple[str, ...]


def read(path: Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """The initializers by name, and the nodes in order."""
    try:
        data = memoryview(path.read_bytes())
        graph = next(value for field, value in fields(data) if field == GRAPH and not isinstance(value, int))
        weights, nodes = {}, []
        for field, value in fields(graph):
            if isinstance(value, int):
                continue
            if field == INITIALIZER:
                name, array = tensor(value)
                weights[name] = array
            elif field == NODE:
                nodes.append(node(value))
    except (StopIteration, IndexError, ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise HeadwiseError(f"{path} is not a whole ONNX file: fetch it again.") from error
    return weights, nodes


def fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of one protobuf message: number, and value (a whole number or a piece of the message)."""
    place = 0
    while place < len(data):
        key, place = varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = varint(data, place)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise ValueError("not a protobuf message")
            size, place = varint(data, place)
        if place + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[place : place + size]
        place += size


def varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7


def tensor(data: memoryview) -> tuple[str, np.ndarray]:
    name, kind, raw = "", 0, None
    dims: list[int] = []
    floats: list[bytes] = []
    for field, value in fields(data):
        if isinstance(value, int):
            if field == DIMS:
                dims.append(value)
            elif field == DATA_TYPE:
                kind = value
        elif field == DIMS:
            dims += packed(value)
        elif field == NAME:
            name = bytes(value).decode()
        elif field == RAW:
            raw = value
        elif field == FLOATS:
            floats.append(bytes(value))
    if kind not in DTYPES:  # a kind of number no weight has
        return name, np.zeros(0)
    flat: np.ndarray = np.frombuffer(b"".join(floats) if raw is None else raw, DTYPES[kind])
    return name, flat.reshape(dims)


def packed(data: memoryview) -> list[int]:
    place, values = 0, []
    while place < len(data):
        value, place = varint(data, place)
        values.append(value)
    return values


def node(data: memoryview) -> Node:
    name, kind, inputs = "", "", []
    for field, value in fields(data):
        if isinstance(value, int):
            continue
        if field == NODE_INPUT:
            inputs.append(bytes(value).decode())
        elif field == NODE_NAME:
            name = bytes(value).decode()
        elif field == NODE_KIND:
            kind = bytes(value).decode()
    return Node(name, kind, tuple(inputs))
