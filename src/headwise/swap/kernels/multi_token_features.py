"""Convolved scores as products. Before the softmax all is linear in the scores, so a kernel over queries and keys is
one over keys alone, for each of the c_q queries it reaches:

    sum_a sum_b theta[a, b] q_{i-a}.k_{j+b} = sum_a q_{i-a}.f^a_j,    f^a_j = sum_b theta[a, b] k_{j+b}

That counts keys which an earlier query i-a doesn't see, j+b > i-a. It happens on the `c_q - 1 + (c_k - 1) / 2` last
diagonals only, and what is too much there follows from the scores of every query with as many of the next keys.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

STEP = 64
"""Keys that are filtered in one product; features are padded to a multiple of it."""


def reach(kernel: Float[Tensor, "heads c_q c_k"]) -> int:
    """On how many diagonals an earlier query may be counted with a key it doesn't see."""
    return kernel.shape[1] - 1 + kernel.shape[2] // 2


def blocks(x: Float[Tensor, "batch kv_heads key dim"], before: int, width: int) -> Tensor:
    """[batch, kv_heads, block, width, dim]: for every STEP tokens those from `before` the first one on, 0 outside."""
    count = -(-x.shape[2] // STEP)
    x = F.pad(x, (0, 0, before, count * STEP + width - STEP - before - x.shape[2]))
    return x.unfold(2, width, STEP).transpose(3, 4)


def filtered(
    k: Float[Tensor, "batch kv_heads key dim"], kernel: Float[Tensor, "heads c_q c_k"]
) -> Float[Tensor, "batch heads padded_key features"]:
    """f, c_q of them beside one another, in the order of the kernel's rows (the query itself is the last)."""
    heads, c_q, c_k = kernel.shape
    width = STEP + -(-(c_k - 1) // 8) * 8
    places = toeplitz(c_k, STEP, width, kernel.device).to(k.dtype)
    matrix = (kernel.to(k.dtype) @ places.flatten(1)).view(heads, c_q, STEP, width).transpose(1, 2)
    near = blocks(k, c_k // 2, width).repeat_interleave(heads // k.shape[1], 1)
    made = torch.matmul(matrix.reshape(heads, 1, STEP * c_q, width), near)
    return made.view(len(k), heads, -1, c_q * k.shape[3])


def unseen(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    kernel: Float[Tensor, "heads c_q c_k"],
    offset: int,
) -> Float[Tensor, "batch heads query reach"]:
    """What the features count too much: [.., i, e] in the score of query i and the key e before it."""
    heads, c_q, c_k = kernel.shape
    far, queries = reach(kernel), q.shape[2]
    after = k[:, :, min(offset + 1, k.shape[2]) : offset + queries + far]
    after = F.pad(after, (0, 0, 0, queries + far - after.shape[2]))
    near = blocks(after, 0, STEP + far)[:, :, : -(-queries // STEP)].repeat_interleave(heads // k.shape[1], 1)
    products = blocks(q, 0, STEP).float() @ near.float().mT  # [.., query of a block, key of its surroundings]
    # A row more than there are keys, read with one key more a row: the diagonals become columns.
    products = F.pad(products.flatten(3), (0, STEP)).unflatten(3, (STEP, STEP + far + 1))[..., :far]
    scores = products.flatten(2, 3)[:, :, :queries]  # [.., i, d]: query i with the key d + 1 after it
    scores = F.pad(scores, (0, 0, c_q - 1, 0)).unfold(2, c_q, 1)
    weight = torch.einsum("hac,acde->hade", kernel.float(), hankel(c_q, c_k, kernel.device))
    return torch.einsum("bhida,hade->bhie", scores, weight)


@lru_cache(maxsize=32)
def toeplitz(taps: int, rows: int, width: int, device: torch.device, first: int = 0) -> Float[Tensor, "tap row width"]:
    """1 where tap t of a row meets the column it is for: `row + t + first`."""
    row, column = torch.arange(rows)[:, None], torch.arange(width)
    return (torch.arange(taps)[:, None, None] == column - row - first).float().to(device)


@lru_cache(maxsize=32)
def hankel(c_q: int, c_k: int, device: torch.device) -> Float[Tensor, "c_q c_k ahead reach"]:
    """1 where tap (a, b) of the key e before a query meets the key d + 1 after the query it looks back to."""
    far = c_q - 1 + c_k // 2
    a, b = torch.arange(c_q)[:, None, None, None], torch.arange(c_k)[:, None, None]
    d, e = torch.arange(far)[:, None], torch.arange(far)
    return (b - c_k // 2 == d + 1 + e - (c_q - 1 - a)).float().to(device)
