"""How a mechanism makes its weights, where they are not the softmax of scaled dot products.

A form is two functions, of queries and keys to scores, and of scores to weights. Readings and edits keep their meaning:
edits of scores act between the two, readings see the weights. `attended` is the one way by which a module of ours asks
for attention, so that a session sees its calls as it sees those of any other model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from headwise.attention.call import AttentionCall


class Form:
    """Scores and weights of one kind of attention; this one is the ordinary kind."""

    local: ClassVar[bool] = True
    """A row's weights need that row and that head alone, so that calls may be cut into rows and heads."""
    softmax: ClassVar[bool] = True
    """The weights are the softmax of the scores: the log-sum-exp has its meaning."""

    def scores(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        """Scores before masks and edits. `call` knows the positions (`i`, `j0`), the scale and the heads' numbers."""
        return torch.einsum("bhid,bhjd->bhij", q, k) * call.scale

    def weights(
        self, s: Float[Tensor, "batch heads query key"], seen: Bool[Tensor, "#batch #heads query key"]
    ) -> Float[Tensor, "batch heads query key"]:
        """Weights from scores, which are -inf where a key is not seen. Asked only where `softmax` is False."""
        return torch.softmax(s, -1).masked_fill(~seen, 0.0)

    def has_kernel(self, call: AttentionCall) -> bool:
        """Whether `kernel` can do this call."""
        return False

    def kernel(self, call: AttentionCall) -> Float[Tensor, "batch heads query value_dim"]:
        """The output by a kernel of the form's own, with gradients."""
        raise TypeError(f"{type(self).__name__} has no kernel.")


def attended(call: AttentionCall) -> Float[Tensor, "batch heads query value_dim"]:
    """The output of one attention call: through the open session of the module that asks, if there is one."""
    tensors = (call.q, call.k, call.v)
    if has_torch_function(tensors):
        return handle_torch_function(attended, tensors, call)
    from headwise.attention.engine import run_call  # the engine knows forms, and forms are run by the engine

    return run_call(call, [], []).out
