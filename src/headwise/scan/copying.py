"""Which heads raise the logits of the tokens they attend to?

Tokens: on random tokens, what a head would write if it attended to token s alone goes the direct path to the logits,
`u_s = U n(v_s W_O)` with the value v_s it really sees and n the gain of the final norm. Over the tokens of the
sequence, centred, `copying_s = 2 relu(u_s[s]) / sum_t relu(u_s[t]) - 1`, averaged over s: 1 raises the token itself
alone, -1 never. Weights: `sum Re(lambda) / sum |lambda|` over the eigenvalues of `E W_V W_O n U`, equal to those of the
small matrix `W_O n U E W_V`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attention import attend
from headwise.attention.readings import Inputs
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import lacks_language_model, quiet
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.tokens import beginning, random_tokens


@dataclass(frozen=True)
class CopyHeads(Question):
    """`copy_heads`: the score on random tokens, the standard error taken over seeds. `copy_weights`: from the weights
    alone."""

    seeds: int = 3
    length: int = 25
    threshold: float = 0.0  # type: ignore[misc]
    first_seed: int = 0
    paper: ClassVar[Paper] = Paper("In-context Learning and Induction Heads", "2209.11895")
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.length < 2:
            raise HeadwiseError(
                f"CopyHeads wants seeds= of at least 1 and length= of at least 2; got {self.seeds!r}, {self.length!r}."
            )

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "copy_heads",
                "Copying heads",
                "Whether a head raises the logit of the very token it looks at, rather than of the others.",
                "-1 to 1",
                "writes what it reads",
                self.threshold,
            ),
            Column(
                "copy_weights",
                "Copying, by weights",
                "How positive the eigenvalues of the head's value-output circuit are, from embedding to logits.",
                "-1 to 1",
                "writes what it reads",
                self.threshold,
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_language_model(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        start = beginning(opened)
        found = []
        for seed in range(self.first_seed, self.first_seed + self.seeds):
            ids = random_tokens(opened, 1, self.length, seed)
            if start is not None:
                ids = torch.cat([torch.tensor([[start]]), ids], dim=1)
            found.append(Prompt({"input_ids": ids.to(opened.device)}, own=seed == self.first_seed))
        return found

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        ids = prompt.inputs["input_ids"]
        skip = ids.shape[1] - self.length
        with attend(opened, readings=[Inputs(("v",), stream="text")]) as run, torch.no_grad():
            opened.model(**prompt.inputs, **quiet(opened.model))
        values = run.tree["text"]["input_v"].isel(sample=0)
        dim = "token" if "token" in values.dims else "key"
        values = values.transpose("layer", "head", dim, "channel")
        unembed, gain = direct_path(opened.model, ids)
        sites = {site.layer: site for site in opened.sites if site.stream == "text"}
        layers = [int(layer) for layer in values["layer"]]
        seen = torch.as_tensor(values.values, dtype=torch.float32)[:, :, skip:]
        chosen = unembed[ids[0, skip:]].float().cpu() * gain.cpu()
        score = [copying(seen[n], sites[layer].W_O.detach().float().cpu(), chosen) for n, layer in enumerate(layers)]
        place = {"layer": values["layer"], "head": values["head"]}
        data = {"copying": xr.DataArray(torch.stack(score).numpy(), place, ("layer", "head"))}
        if prompt.own:
            circuit = (unembed.float() * gain).T @ opened.model.get_input_embeddings().weight.detach().float()[
                : len(unembed)
            ]
            eigen = [positivity(sites[layer], circuit.cpu()) for layer in layers]
            data["weights"] = xr.DataArray(torch.stack(eigen).numpy(), place, ("layer", "head"))
        return {"text": xr.Dataset(data)}

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {
            "copy_heads": values["copying"],
            "copy_heads_sem": values["copying_sem"],
            "copy_weights": values["weights"],
        }


def copying(
    values: Float[Tensor, "head token channel"],
    out: Float[Tensor, "head channel model"],
    unembed: Float[Tensor, "token model"],
) -> Float[Tensor, " head"]:
    """The score of every head of a layer; `unembed` holds the rows of the sequence's own tokens, gain included."""
    logits = torch.einsum("htc,hcd,sd->hts", values, out, unembed)
    raised = (logits - logits.mean(-1, keepdim=True)).relu()
    total = raised.sum(-1)
    own = raised.diagonal(dim1=1, dim2=2)
    ratio = torch.where(total > 0, own / total.clamp(min=1e-30), 0.0)
    return 2 * ratio.mean(-1) - 1


def positivity(site: object, circuit: Float[Tensor, "model model2"]) -> Float[Tensor, " head"]:
    """`sum Re(lambda) / sum |lambda|` for every head; `circuit` is `n U E` as [model, model]."""
    out, value = site.W_O.detach().float().cpu(), site.W_V.detach().float().cpu()  # type: ignore[attr-defined]
    value = value.repeat_interleave(out.shape[0] // value.shape[0], dim=0)
    roots = torch.linalg.eigvals(out @ circuit @ value)
    return roots.real.sum(-1) / roots.abs().sum(-1).clamp(min=1e-30)


def direct_path(model: nn.Module, ids: Int[Tensor, "batch token"]) -> tuple[Tensor, Tensor]:
    """The unembedding [vocabulary, model] and the gain of the norm in front of it (ones where there is none).

    The norm is found by watching which module's output is what the unembedding gets; its gain is read from its answer
    to an alternating vector of +1 and -1, which has mean 0 and square mean 1: `(norm(x) - norm(-x)) / 2 = gain x`.
    """
    head = model.get_output_embeddings()
    ones = torch.ones(head.weight.shape[1], device=head.weight.device)
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept, so that no address is used twice
    found: list[nn.Module] = []

    def remember(module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and any(
            p.ndim == 1 and len(p) == len(ones) for p in module.parameters(recurse=False)
        ):
            outputs[output.data_ptr()] = (module, output)

    def notice(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].data_ptr() in outputs:
            found.append(outputs[args[0].data_ptr()][0])

    hooks = [m.register_forward_hook(remember) for m in model.modules() if m is not head]
    hooks.append(head.register_forward_pre_hook(notice))
    try:
        with torch.no_grad():
            model(input_ids=ids[:, :2])
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return head.weight.detach(), ones
    signs = ones.clone()
    signs[1::2] = -1
    signs = signs.to(head.weight.dtype)
    with torch.no_grad():
        gain = (found[0](signs) - found[0](-signs)) / 2 * signs
    return head.weight.detach(), gain.float()
