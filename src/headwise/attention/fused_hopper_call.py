"""Calls the Hopper kernel: what it can do, its tables of runs and its results."""

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headwise.attention.fused_hopper import hopper_forward
from headwise.attention.fused_merge import finish_masses
from headwise.attention.fused_runs import runs_of
from headwise.attention.fused_types import FusedCall, FusedResult

LOG2E = 1.4426950408889634
BLOCK_Q, BLOCK_K, STAGES = 128, 128, 2


def hopper_fits(call: FusedCall) -> bool:
    """Whether the kernel can do this call: its shapes, and segments that come in long runs."""
    q, k, v = call.q, call.k, call.v
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    if q.dtype == torch.float32 or v is None or q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128):
        return False
    if any(x is not None for x in (call.positions, call.window, call.key_valid, call.softcap, call.key_bias)):
        return False
    if call.want & {"distance", "top"}:
        return False
    if any(x.stride(-1) != 1 or x.data_ptr() % 16 or any(s % 8 for s in x.stride()[:-1]) for x in (q, k, v)):
        return False
    if not call.labelled or call.key_labels is None:
        return True
    runs = runs_of(call.key_labels, call.segments, BLOCK_K)
    return runs.count <= 64 + call.k.shape[2] // BLOCK_K


def hopper(call: FusedCall) -> FusedResult:
    """Run the kernel on a call that `hopper_fits`."""
    q, k, v = call.q, call.k, call.v
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    entropy, inner = "entropy" in call.want, "segment_entropy" in call.want
    labelled = call.labelled
    runs = runs_of(call.key_labels, call.segments, BLOCK_K) if labelled and call.key_labels is not None else None
    slots = runs.slots if runs is not None else 1
    out = torch.empty((batch, queries, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    nats = torch.empty_like(lse) if entropy else lse
    mass = lse.new_full((batch, heads, queries, slots), float("-inf")) if labelled else lse
    within = torch.zeros_like(mass) if inner else lse
    bias, query_labels = lse, lse
    if call.bias_table is not None and call.query_labels is not None and runs is not None:
        table = torch.nn.functional.pad(call.bias_table.float() * LOG2E, (0, slots - call.segments)).clamp(min=-1e30)
        label = runs.table[..., 1].long() & 255
        bias = table[:, :, label].movedim(2, 0).contiguous()
        query_labels = call.query_labels.expand(batch, -1).int().contiguous()
    kind = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16

    def described(x, rows):
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], kind)
        return TensorDescriptor.from_tensor(x, [1, 1, rows, dim], layout)

    hopper_forward[(batch * heads * -(-queries // BLOCK_Q),)](
        described(q, BLOCK_Q // 2), described(k, BLOCK_K), described(v, BLOCK_K), out, lse, nats, mass, within,
        lse if runs is None else runs.table, lse if runs is None else runs.of_tile, bias, query_labels,
        call.sinks.float() if call.sinks is not None else lse,
        *out.stride()[:3], heads, heads // kv_heads, queries, keys, call.query_offset, call.scale * LOG2E,
        *(spread(runs.table), spread(runs.of_tile)) if runs is not None else (0, 0), spread(bias), *bias.stride()[1:3],
        G=slots, CAUSAL=call.causal, MASS=labelled, INNER=inner, ENTROPY=entropy, BIAS=call.bias_table is not None,
        SINKS=call.sinks is not None, BM=BLOCK_Q, BN=BLOCK_K, D=dim, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    found = FusedResult(lse, out, entropy=nats if entropy else None, path="hopper")
    if call.want & {"mass", "segment_entropy"}:
        finish_masses(mass, lse)
        found.mass = mass[..., : call.segments]
    if inner:
        found.segment_entropy = within.mul_(0.6931471805599453)[..., : call.segments]
    return found


def spread(x: torch.Tensor) -> int:
    """Entries from one sample to the next; 0 when all samples share one."""
    return 0 if x.shape[0] == 1 else x.stride(0)
