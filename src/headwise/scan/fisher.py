"""Where in the attention weights does the likelihood lie? The diagonal of the Fisher information, per head and matrix.

`F = E (d log p(text) / d w)^2`, estimated with the gradient of each text's own next tokens, its mean over the entries
of a head's part of W_Q, W_K, W_V or W_O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.needs import lacks_language_model
from headwise.scan.run import make_prompts

MATRICES = ("q", "k", "v", "o")


def attention_fisher(opened: Opened, texts: str | Sequence[str] | None = None, inputs: Any = None) -> xr.DataArray:
    """Dims matrix, layer, head; W_K and W_V of a head are those of the key-value head that it shares. Texts count one
    by one (the mean over tokens within a text). `.grad` of the model is left as it is."""
    reason = lacks_language_model(opened)
    if reason is not None:
        raise HeadwiseError(f"attention_fisher needs {reason}; {opened.name} does not have that.")
    prompts = make_prompts(opened, texts, inputs, None)
    if not prompts:
        raise HeadwiseError("texts: attention_fisher needs something to read; give texts=[...] or inputs=[...].")
    sites = [site for site in opened.sites if site.stream == "text"]
    views = {(site.layer, m): getattr(site, f"W_{m.upper()}") for site in sites for m in MATRICES}
    owners = {key: view._base if view._base is not None else view for key, view in views.items()}
    parameters = list({id(p): p for p in owners.values()}.values())
    total = np.zeros((len(MATRICES), len(sites), max(site.heads for site in sites)))
    for prompt in prompts:
        gradients = {id(p): g for p, g in zip(parameters, likelihood_gradient(opened, prompt.inputs, parameters))}
        for place, site in enumerate(sites):
            for number, matrix in enumerate(MATRICES):
                view = views[site.layer, matrix]
                gradient = gradients[id(owners[site.layer, matrix])].contiguous()
                part = torch.as_strided(gradient, view.shape, view.stride(), view.storage_offset())
                mean = part.float().pow(2).mean(dim=(1, 2)).repeat_interleave(site.heads // len(part))
                total[number, place, : site.heads] += mean.cpu().numpy() / len(prompts)
    coords = {"matrix": list(MATRICES), "layer": [site.layer for site in sites], "head": range(total.shape[-1])}
    return xr.DataArray(total, dims=("matrix", "layer", "head"), coords=coords)


def likelihood_gradient(opened: Opened, inputs: dict[str, Any], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        logits = opened.model(**inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs["input_ids"][:, 1:].flatten())
        return torch.autograd.grad(loss, parameters)
