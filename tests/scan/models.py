"""Small models for the scan's tests: a random Llama with a word tokenizer, and an induction circuit set by hand."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.models import Opened, open_model
from headwise.scan.needles import NEEDLES, haystack


@cache
def tokenizer(words: int = 4000) -> PreTrainedTokenizerFast:
    text = haystack() + " ".join(f"{n.text} {n.question}" for n in NEEDLES)
    splitter = pre_tokenizers.Whitespace()
    found = dict.fromkeys(word for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {word: n + 3 for n, word in enumerate(list(found)[:words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def llama(**changes: object) -> Opened:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer()), "max_position_embeddings": 1024}
    config = LlamaConfig(**sizes | changes, initializer_range=0.3, tie_word_embeddings=False)
    return open_model(LlamaForCausalLM(config).eval(), tokenizer=tokenizer())


def bert() -> Opened:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer())
    )
    return open_model(BertModel(config).eval(), tokenizer=tokenizer())


class Attention(nn.Module):
    """One head of plain causal attention."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.num_heads = 1
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(width, inner, bias=False))
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x)[:, None] for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class InductionCircuit(nn.Module):
    """Residual stream = [token | position | token before], all one-hot. The first layer's head looks one back and
    writes that token into the third part; the second layer's head looks for places whose token before is the current
    token."""

    def __init__(self, tokens: int, positions: int, sharp: float = 1e3):
        super().__init__()
        inner = max(tokens, positions)
        width = 2 * tokens + positions
        self.positions = positions
        self.embed = nn.Embedding(tokens, width)
        self.unembed = nn.Linear(width, tokens, bias=False)
        self.layers = nn.ModuleList([Attention(width, inner), Attention(width, inner)])
        token, position, before = slice(0, tokens), slice(tokens, tokens + positions), slice(tokens + positions, width)
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()
            self.embed.weight[:, token] = torch.eye(tokens)
            self.unembed.weight[:, token] = torch.eye(tokens)
            back, match = self.layers
            back.q_proj.weight[:positions, position] = sharp * torch.eye(positions)
            back.k_proj.weight[1:positions, position] = torch.eye(positions)[:-1]
            back.v_proj.weight[:tokens, token] = torch.eye(tokens)
            back.o_proj.weight[before, :tokens] = torch.eye(tokens)
            match.q_proj.weight[:tokens, token] = sharp * torch.eye(tokens)
            match.k_proj.weight[:tokens, before] = torch.eye(tokens)
            match.v_proj.weight[:tokens, token] = torch.eye(tokens)
            match.o_proj.weight[token, :tokens] = torch.eye(tokens)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        n = input_ids.shape[1]
        x = self.embed(input_ids)
        start = self.embed.num_embeddings
        x = x + F.pad(torch.eye(n), (start, x.shape[-1] - start - n))
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(logits=self.unembed(x))


def circuit(positions: int = 80) -> Opened:
    return open_model(InductionCircuit(len(tokenizer()), positions).eval(), tokenizer=tokenizer())
