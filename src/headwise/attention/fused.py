"""Attention with statistics in one kernel: the Python entry.

`fused_attention` picks the Hopper kernel (`fused_hopper.py`) where it can and the portable one (`fused_kernels.py`)
elsewhere; with few queries the keys are split over the chip and the parts merged (`fused_merge.py`). What a call asks
for decides the code that is compiled; nothing depends on the data but the layout of the segments. Any device Triton
knows; on the CPU only in Triton's interpreter (TRITON_INTERPRET=1), which the tests use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attention.fused_kernels import forward
from headwise.attention.fused_merge import merge
from headwise.attention.fused_runs import group_tiles
from headwise.attention.fused_types import SEGMENTS, WANTS, FusedCall, FusedResult, supports
from headwise.attention.once import numbers
from headwise.errors import HeadwiseError

LOG2E = 1.4426950408889634
PACKED_ROWS = 64
"""Up to so many rows (queries times heads that share keys) are worked on together, with the keys split."""


def fused_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"] | None,
    *,
    scale: float,
    causal: bool = False,
    query_offset: int = 0,
    positions: Int[Tensor, " query"] | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_valid: Bool[Tensor, "batch key"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    key_labels: Int[Tensor, "#batch key"] | None = None,
    query_labels: Int[Tensor, "#batch query"] | None = None,
    segments: int = 0,
    bias_table: Float[Tensor, "heads query_segment segment"] | None = None,
    key_bias: Float[Tensor, "#heads key"] | None = None,
    want: frozenset[str] = frozenset(),
) -> FusedResult:
    """`softmax(softcap(scale q k) + biases) v` and the statistics in `want`, without the matrix.

    A query's position is query_offset + row, or positions[row]; a key's is its column. `v=None` leaves out the output.
    Labels are 0 .. segments - 1, or negative for no segment. bias_table[head, query label, key label] is added to the
    scores (-inf knocks out), key_bias[head, key] too. `sinks` is one more score a head in the normaliser only.
    """
    if unknown := set(want) - WANTS:
        raise HeadwiseError(f"want={sorted(unknown)} is not known: choose from {', '.join(sorted(WANTS))}.")
    call = FusedCall(q, k, v, scale, causal, query_offset, positions, window, key_valid, softcap, sinks,
                     key_labels, query_labels, segments, bias_table, key_bias, frozenset(want))  # fmt: skip
    return run(call)


def run(call: FusedCall) -> FusedResult:
    _check(call)
    if call.q.device.type == "cuda" and not packed(call):
        # Imported here: it needs Triton's experimental language, which only NVIDIA builds have.
        from headwise.attention.fused_hopper_call import hopper, hopper_fits

        if hopper_fits(call):
            return hopper(call)
    batch, heads, queries = call.q.shape[:3]
    shape = (batch, heads, queries)
    splits = split_count(call)
    found = portable(call, splits)
    if splits > 1:
        found = merge(found, shape, splits, 1, call.q.dtype, sinks=call.sinks)
    return FusedResult(**{name: x[0] for name, x in found.items()}, path="split" if splits > 1 else "portable")


def reweight(
    call: FusedCall, groups: Sequence[int], rule: Callable[[Tensor], Tensor]
) -> tuple[FusedResult, Float[Tensor, "batch heads query group"]]:
    """Attend each group of segments by itself and merge with weights `rule(masses)`.

    groups[segment] is the segment's group, 0 .. count - 1, or -1 for segments left as they are. Keys without a label
    are left as they are too. `rule` maps masses [batch, heads, query, group] to factors of the same shape.
    """
    _check(call)
    count = max(groups) + 1
    bits = [0] * (count + 1)
    for segment, group in enumerate(groups):
        bits[group] |= 1 << segment
    bits[count] |= 1 << SEGMENTS
    batch, heads, queries = call.q.shape[:3]
    shape = (batch, heads, queries)
    splits = split_count(call)
    found = portable(call, splits, tuple(bits))
    each = merge(found, shape, splits, count + 1, torch.float32) if splits > 1 else found
    logs = each["lse"]
    whole = logs.logsumexp(0)
    if call.sinks is not None:
        whole = torch.logaddexp(whole, call.sinks.float()[None, :, None])
    masses = torch.exp(logs[:count] - whole).nan_to_num(0.0).movedim(0, -1)
    factors = rule(masses)
    kept = torch.cat([factors, torch.ones_like(factors[..., :1])], -1).float().contiguous()
    one = merge(each, shape, count + 1, 1, call.q.dtype, factor=kept, sinks=call.sinks)
    return FusedResult(**{name: x[0] for name, x in one.items()}, path="groups"), factors


def _check(call: FusedCall) -> None:
    fine, reason = supports(call)
    if not fine:
        raise HeadwiseError(f"This attention call can't be fused: {reason}.")
    if call.want & {"mass", "segment_entropy"} and call.key_labels is None:
        raise HeadwiseError("want= asks for masses of segments, so key_labels= must be given.")
    if call.bias_table is not None and (call.key_labels is None or call.query_labels is None):
        raise HeadwiseError("bias_table= speaks of segments, so key_labels= and query_labels= must be given.")


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def packed(call: FusedCall) -> bool:
    return call.q.shape[2] * call.group <= PACKED_ROWS


def split_count(call: FusedCall) -> int:
    """Over how many programs the keys of one block are spread; from the shapes alone, so results repeat."""
    keys, chips = call.k.shape[2], multiprocessors(call.q.device)
    if packed(call):
        return max(1, min(2 * chips // (call.q.shape[0] * call.k.shape[1]), triton.cdiv(keys, 256), 64))
    busy = call.q.shape[0] * call.q.shape[1] * triton.cdiv(call.q.shape[2], 128)
    return max(1, min(2 * chips // busy, keys // 2048, 16))


def blocks(call: FusedCall) -> dict[str, int]:
    """Block sizes, warps and stages for the portable kernel."""
    wide = triton.next_power_of_2(max(call.q.shape[-1], call.v.shape[-1] if call.v is not None else 16))
    rows = call.q.shape[2] * (call.group if packed(call) else 1)
    few = max(16, triton.next_power_of_2(rows))
    if call.q.dtype == torch.float32:
        return {"BM": min(few, 32), "BN": 32, "num_warps": 4, "num_stages": 2}
    if few <= 64:
        return {"BM": few, "BN": 64, "num_warps": 4, "num_stages": 3 if wide <= 128 else 2}
    return {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3 if wide <= 128 else 2}


def portable(call: FusedCall, splits: int = 1, group_bits: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """Run the portable kernel; every result has a leading dim of splits times groups."""
    q, k, v, want = call.q, call.k, call.v, call.want
    batch, heads, queries, dim = q.shape
    keys, value_dim = k.shape[2], v.shape[-1] if v is not None else 16
    groups = len(group_bits) if group_bits is not None else 1
    parts, sizes, pack = splits * groups, blocks(call), packed(call)
    tile, stretch = sizes["BN"], triton.cdiv(triton.cdiv(keys, splits), sizes["BN"]) * sizes["BN"]
    left, right = call.bounds

    def room(*last, dtype=torch.float32):
        return torch.empty(parts, batch, heads, queries, *last, dtype=dtype, device=q.device)

    found = {"lse": room()}
    if v is not None and parts == 1:
        found["out"] = torch.empty(1, batch, queries, heads, value_dim, dtype=q.dtype, device=q.device).transpose(2, 3)
    elif v is not None:
        found["out"] = room(value_dim)
    slots = max(call.segments, 1)
    for name in sorted(want - {"mass", "segment_entropy", "top"}):
        found[name] = room()
    if "distance" in want:
        found["distance_sq"] = room()
    if want & {"mass", "segment_entropy"}:
        found["mass"] = room(slots)
    if "segment_entropy" in want:
        found["segment_entropy"] = room(slots)
    if "top" in want:
        found |= {"top_value": room(), "top_index": room(dtype=torch.int32)}

    def given(x, dtype=None):
        return found["lse"] if x is None else (x if dtype is None else x.to(dtype)).contiguous()

    def step(x, dim=0):
        return 0 if x is None or x.shape[dim] == 1 else x.stride(dim)

    labelled = call.labelled or group_bits is not None
    listed, before, bits = None, None, None
    if group_bits is not None and call.key_labels is not None:
        listed, before = group_tiles(call.key_labels, tile, group_bits)
        bits = numbers(group_bits, q.device)
    values = v if v is not None else k
    rows = queries * (call.group if pack else 1)
    grid = (triton.cdiv(rows, sizes["BM"]), batch * (k.shape[1] if pack else heads), parts)
    out = found.get("out", found["lse"][..., None])
    table = given(call.bias_table, torch.float32) * LOG2E if call.bias_table is not None else found["lse"]
    first, *others = ("lse", "entropy", "mass", "segment_entropy", "distance", "distance_sq", "top_value", "top_index")
    shared = call.key_labels is None or call.key_labels.shape[0] == 1
    forward[grid](
        q, k, values, out, found[first], *(found.get(name, found[first]) for name in others),
        given(call.positions, torch.int32), given(call.key_valid, torch.uint8),
        given(call.key_labels if labelled else None, torch.int32),
        given(call.query_labels, torch.int32), given(listed), given(before), given(bits), table,
        given(call.key_bias, torch.float32), given(call.sinks, torch.float32),
        *q.stride()[:3], *k.stride()[:3], *values.stride()[:3], *out.stride()[:4],
        step(call.key_labels), step(call.query_labels), 0 if shared else groups, table.stride(0), table.stride(1),
        step(call.key_bias),
        heads, queries, keys, call.query_offset, left or 0, right or 0,
        call.scale if call.softcap is not None else call.scale * LOG2E, call.softcap or 1.0, stretch, groups, slots,
        group=call.group, PACK=pack, POSITIONS=call.positions is not None, HAS_RIGHT=right is not None,
        HAS_LEFT=left is not None, HAS_VALID=call.key_valid is not None, SOFTCAP=call.softcap is not None,
        HAS_SINKS=call.sinks is not None and parts == 1, HAS_LABELS=labelled, HAS_GROUPS=group_bits is not None,
        HAS_BIAS=call.bias_table is not None, HAS_KEY_BIAS=call.key_bias is not None, W_OUT=v is not None,
        W_MASS="mass" in found, W_ENTROPY="entropy" in want, W_INNER="segment_entropy" in want,
        W_DISTANCE="distance" in want, W_TOP="top" in want, EXACT=q.dtype == torch.float32,
        D=dim, DP=max(16, triton.next_power_of_2(dim)), DV=value_dim, DVP=max(16, triton.next_power_of_2(value_dim)),
        GP=max(16, triton.next_power_of_2(slots)), **sizes,
    )  # fmt: skip
    return found
