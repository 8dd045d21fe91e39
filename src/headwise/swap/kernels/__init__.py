"""GPU kernels of mechanisms that libraries have none for."""

import torch

from headwise.attention.call import AttentionCall
from headwise.attention.engine import has_triton


def fits(call: AttentionCall) -> bool:
    """Whether a call is of the kind all these kernels know: on a GPU, in 32 or 16 bits, causal or not, with padding."""
    mask = call.mask
    odd = (mask.left, mask.rule, mask.allowed, mask.added, mask.indices, call.bias, call.sinks, call.softcap)
    return (
        call.q.is_cuda
        and has_triton()
        and all(x is None for x in odd)
        and mask.right in (None, 0)
        and call.q.dtype != torch.float64
        and max(call.q.shape[-1], call.v.shape[-1]) <= 256
    )
