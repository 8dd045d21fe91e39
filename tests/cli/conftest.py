"""A tiny model on disk, and the command line as a function."""

import sys
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import headwise.cli

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "saw", "log", "it", "was", "tired", "because", "of"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random Llama of two layers and a tokenizer of a few words; 64 positions."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes, **heads)).save_pretrained(folder)
    return folder


@dataclass
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def headwise_cli(monkeypatch, capsys):
    """Runs `headwise ARGUMENTS` in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["headwise", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            headwise.cli.main()
        said = capsys.readouterr()
        return Said(left.value.code or 0, said.out, said.err)

    return run
