"""Real pictures for studies of vision models: random crops of photographs that scikit-image carries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from headwise.extras import need

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry")
"""Colour pictures that scikit-image carries."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(names: Sequence[str], crops: int, size: int, seed: int) -> Float[Tensor, "crop 3 size size"]:
    """Random square crops, a quarter to all of the shorter side, brought to `size` and normalised for vision models."""
    data = need("skimage.data", "dev")
    generator = torch.Generator().manual_seed(seed)
    pictures = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[:3].float() / 255 for name in names]
    found = []
    for number in range(crops):
        picture = pictures[number % len(pictures)]
        short = min(picture.shape[1:])
        side = int(short * (0.25 + 0.75 * torch.rand(1, generator=generator).item()))
        top, left = (torch.randint(n - side + 1, (1,), generator=generator).item() for n in picture.shape[1:])
        crop = picture[None, :, top : top + side, left : left + side]
        found.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (torch.cat(found) - mean) / std
