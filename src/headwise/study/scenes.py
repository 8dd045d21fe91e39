"""Pictures of one coloured shape on a coloured ground, with what they show in words."""

from __future__ import annotations

from itertools import product

import numpy as np
from jaxtyping import UInt8

COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (235, 215, 50),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 0.16, "large": 0.34}


def scenes(count: int, size: int = 112, seed: int = 0) -> tuple[list[UInt8[np.ndarray, "height width 3"]], list[str]]:
    """`count` different scenes, drawn at random among all, each at a random place; and their captions."""
    draw = np.random.default_rng(seed)
    every = [(k, s, c, g) for k, s, c, g in product(SIZES, SHAPES, COLOURS, COLOURS) if c != g]
    chosen = [every[n] for n in draw.permutation(len(every))[:count]]
    pictures, captions = [], []
    for kind, shape, colour, ground in chosen:
        radius = SIZES[kind]
        x, y = draw.uniform(radius, 1 - radius, 2)
        picture = np.empty((size, size, 3), np.uint8)
        picture[:] = COLOURS[ground]
        picture[covers(shape, x, y, radius, size)] = COLOURS[colour]
        pictures.append(picture)
        captions.append(f"a {kind} {colour} {shape} on a {ground} background")
    return pictures, captions


def covers(shape: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """Which pixels the shape covers; place and radius as shares of the picture."""
    across, down = np.meshgrid((np.arange(size) + 0.5) / size - x, (np.arange(size) + 0.5) / size - y)
    far, wide = np.hypot(across, down), np.maximum(np.abs(across), np.abs(down))
    if shape == "circle":
        return far <= radius
    if shape == "ring":
        return (far <= radius) & (far >= 0.6 * radius)
    if shape == "square":
        return wide <= 0.85 * radius
    if shape == "cross":
        return (wide <= radius) & (np.minimum(np.abs(across), np.abs(down)) <= radius / 3)
    return (np.abs(across) <= (down + radius) / 2) & (down <= 0.8 * radius)
