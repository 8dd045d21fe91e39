"""The way in for models that call PyTorch's attention themselves: timm, diffusers, torch.nn, some of transformers.

An active function mode sees `scaled_dot_product_attention` and `multi_head_attention_forward` (and by being there
switches off the fused inference path of `nn.TransformerEncoder`, which would bypass both).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headwise.attention.call import AttentionCall
from headwise.attention.engine import Part
from headwise.attention.form import attended
from headwise.attention.mask import Mask
from headwise.attention.readings import Map
from headwise.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise.attention.seam import Session

SDPA = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "query": inspect.Parameter.empty,
            "key": inspect.Parameter.empty,
            "value": inspect.Parameter.empty,
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": False,
            "scale": None,
            "enable_gqa": False,
        }.items()
    ]
)
MHA = inspect.signature(F.multi_head_attention_forward)


class FunctionMode(TorchFunctionMode):
    """Hands PyTorch's attention calls of an attached model to its session."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.session.busy or not self.session.stack:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.sdpa(SDPA.bind(*args, **kwargs))
        if func is attended:
            return self.session.call(args[0], self.session.owner(), "function-mode")
        if func is F.multi_head_attention_forward:
            return self.mha(func, MHA.bind(*args, **kwargs))
        return func(*args, **kwargs)

    def sdpa(self, bound: inspect.BoundArguments) -> Tensor:
        bound.apply_defaults()
        a = bound.arguments
        q, k, v = (x if x.ndim > 3 else x[..., None, :, :] for x in (a["query"], a["key"], a["value"]))
        lead = q.shape[:-3]
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        out = self.attend(q, k, v, a["attn_mask"], a["is_causal"], a["scale"], a["dropout_p"])
        out = out.reshape(*lead, *out.shape[1:])
        return out if a["query"].ndim > 3 else out.squeeze(-3)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None, causal: bool, scale: float | None, dropout: float
    ) -> Tensor:
        session = self.session
        owner = session.owner()
        if dropout:
            raise HeadwiseError(f"{session.names[owner]} uses attention dropout: call model.eval() before attend.")
        mask = Mask(right=0 if causal else None, batch=q.shape[0])
        if given is not None:
            shaped = given.reshape((1,) * (4 - given.ndim) + given.shape) if given.ndim < 4 else given
            shaped = shaped.reshape(-1, *shaped.shape[-3:])
            if given.dtype == torch.bool:
                mask.allowed = shaped
            else:
                mask.added = shaped
        # PyTorch's causal mask is aligned at the upper left; without one, the queries follow what is in the cache.
        start = 0 if causal or session.frame is None else session.frame.past
        i = torch.arange(q.shape[2], device=q.device) + start
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return session.call(AttentionCall(q, k, v, scale, mask, i=i), owner, "function-mode")

    def mha(self, func: Any, bound: inspect.BoundArguments) -> Any:
        """`nn.MultiheadAttention`: its projections, our attention, its output projection."""
        bound.apply_defaults()
        a = bound.arguments
        session = self.session
        owner = session.owner()
        odd = [n for n in ("bias_k", "bias_v", "static_k", "static_v") if a[n] is not None]
        odd += ["add_zero_attn"] * bool(a["add_zero_attn"])
        if odd:
            session.refused[session.names[owner]] = f"nn.MultiheadAttention with {', '.join(odd)} is not supported"
            return func(*bound.args, **bound.kwargs)
        batched = a["query"].ndim == 3
        query, key, value = (x if batched else x.unsqueeze(1) for x in (a["query"], a["key"], a["value"]))
        q, k, v = project(a, query, key, value)
        heads = a["num_heads"]
        q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
        given = merge_masks(a["attn_mask"], a["key_padding_mask"], q.shape[0], heads, batched)
        dropout = a["dropout_p"] if a["training"] else 0.0
        z = self.attend(q, k, v, given, False, None, dropout)
        out = F.linear(z.permute(2, 0, 1, 3).flatten(2), a["out_proj_weight"], a["out_proj_bias"])
        weights = self.weights(q, k, v, given, a["average_attn_weights"]) if a["need_weights"] else None
        if not batched:
            out = out.squeeze(1)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    @staticmethod
    def weights(q: Tensor, k: Tensor, v: Tensor, given: Tensor | None, average: bool) -> Tensor:
        """The unedited weights, which the caller asked `nn.MultiheadAttention` for."""
        from headwise.attention.engine import run_call

        mask = Mask(batch=q.shape[0])
        if given is not None and given.dtype == torch.bool:
            mask.allowed = given
        else:
            mask.added = given
        call = AttentionCall(q, k, v, q.shape[-1] ** -0.5, mask)
        rows = run_call(call, [], [Part(Map())]).values[0]["map"].to(q.dtype)
        return rows.mean(1) if average else rows


def project(a: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The input projections of `nn.MultiheadAttention`, [token, batch, width]."""
    bias = a["in_proj_bias"]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if a["use_separate_proj_weight"]:
        matrices = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
    else:
        matrices = a["in_proj_weight"].chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases, strict=True))


def merge_masks(given: Tensor | None, padding: Tensor | None, batch: int, heads: int, batched: bool) -> Tensor | None:
    """`nn.MultiheadAttention`'s two masks (True = blocked, or additive) as one of ours (True = allowed)."""
    parts = []
    if given is not None:
        shaped = given.view(batch, heads, *given.shape[-2:]) if given.ndim == 3 else given[None, None]
        parts.append(shaped)
    if padding is not None:
        padding = padding if batched else padding[None]
        parts.append(padding[:, None, None])
    if not parts:
        return None
    if all(p.dtype == torch.bool for p in parts):
        blocked = parts[0] if len(parts) == 1 else parts[0] | parts[1]
        return ~blocked
    floats = [
        p if p.is_floating_point() else torch.zeros(p.shape, device=p.device).masked_fill(p, float("-inf"))
        for p in parts
    ]
    return floats[0] if len(floats) == 1 else floats[0] + floats[1]
