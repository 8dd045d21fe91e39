"""Tiny models and a tokenizer that need no download."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = "<unk> <s> </s> <pad> <image>"
WORDS = "the cat sat on mat a dog ran system user assistant be brief hello there who are you first second"
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


def word_tokenizer(**kw) -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(f"{SPECIAL} {WORDS}".split())}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
        **kw,
    )


def llama(max_position_embeddings: int = 16) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> transformers.T5ForConditionalGeneration:
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=3
    )
    return transformers.T5ForConditionalGeneration(config).eval()
