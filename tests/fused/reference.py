"""A plain float64 attention with every statistic, written apart from the library: what the fused kernels must give."""

import torch


def reference(
    q,
    k,
    v,
    *,
    scale,
    causal=False,
    query_offset=0,
    positions=None,
    window=None,
    key_valid=None,
    softcap=None,
    sinks=None,
    key_labels=None,
    query_labels=None,
    segments=0,
    bias_table=None,
    key_bias=None,
    factors=None,
):
    """`factors` [batch, heads, query, segments] multiplies finished weights by segment (Reweight)."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    i = (torch.arange(queries, device=q.device) + query_offset) if positions is None else positions.to(q.device)
    j = torch.arange(keys, device=q.device)
    if key_labels is not None:
        key_labels = key_labels.expand(batch, -1).long()
    if bias_table is not None:
        rows = query_labels.expand(batch, -1).long()
        table = torch.cat([bias_table.double(), torch.zeros_like(bias_table[..., :1]).double()], -1)
        columns = torch.where(key_labels < 0, table.shape[-1] - 1, key_labels)
        s = s + torch.stack([table[:, rows[b]][..., columns[b]] for b in range(batch)])
    if key_bias is not None:
        s = s + key_bias.double()[None, :, None, :]
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=q.device)
    gap = i[:, None] - j[None]
    if causal:
        seen = seen & (gap >= 0)
    if window is not None:
        left, right = window
        seen = seen if left is None else seen & (gap <= left)
        seen = seen if right is None else seen & (-gap <= right)
    if key_valid is not None:
        seen = seen & key_valid[:, None, None, :]
    s = s.masked_fill(~seen, float("-inf"))
    column = s if sinks is None else torch.cat([s, sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    lse = torch.logsumexp(column, -1)
    a = torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None])
    a = torch.where(torch.isfinite(s), a, 0.0)
    onehot = None
    if key_labels is not None:
        onehot = (key_labels[..., None] == torch.arange(segments, device=q.device)).double()
    if factors is not None:
        a = a * (torch.einsum("bhig,bjg->bhij", factors.double(), onehot) + (1 - onehot.sum(-1))[:, None, None])
    found = {"out": a @ v, "lse": lse, "entropy": torch.special.entr(a).sum(-1), "weights": a, "scores": s}
    distance = gap.abs().double()
    found["distance"] = (a * distance).sum(-1)
    found["distance_sq"] = (a * distance**2).sum(-1)
    found["top_value"], found["top_index"] = a.max(-1)
    found["received"] = a.sum(2)
    if onehot is not None:
        found["mass"] = torch.einsum("bhij,bjg->bhig", a, onehot)
        inner = []
        for g in range(segments):
            part = a * onehot[:, None, None, :, g]
            part = part / part.sum(-1, keepdim=True).clamp(min=1e-300)
            inner.append(torch.special.entr(part).sum(-1))
        found["segment_entropy"] = torch.stack(inner, -1)
    return found


def error(found, wanted, least=1e-9):
    """Error in the 2-norm, relative to what is wanted or to `least`; infinities must sit in the same places."""
    found, wanted = found.double(), wanted.double().to(found.device)
    assert torch.equal(torch.isinf(found), torch.isinf(wanted)), "infinities differ"
    found, wanted = found.masked_fill(torch.isinf(found), 0), wanted.masked_fill(torch.isinf(wanted), 0)
    assert not torch.isnan(found).any(), "nan"
    return float((found - wanted).norm() / wanted.norm().clamp(min=least))
