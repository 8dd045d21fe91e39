"""Text encoders and encoder-decoders that dispatch through transformers' attention interface."""

import torch

from .family import Batch, Family, right_padded

BERT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, type_vocab_size=2, pad_token_id=0,
)  # fmt: skip
LAYERS = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip
T5 = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
    decoder_start_token_id=0,
)  # fmt: skip


def layout(config: object) -> Batch:
    corners = torch.randint(0, 30, (2, 12, 2))
    return right_padded(config) | {"bbox": torch.cat([corners, corners + torch.randint(1, 9, (2, 12, 2))], dim=-1)}


def markup(config: object) -> Batch:
    shape = (2, 12, 4)
    return right_padded(config) | {
        "xpath_tags_seq": torch.randint(0, 8, shape),
        "xpath_subs_seq": torch.randint(0, 8, shape),
    }


def translation(config: object) -> Batch:
    """Twelve source tokens (the second sentence shorter), seven target tokens."""
    return right_padded(config) | {"decoder_input_ids": torch.randint(8, 60, (2, 7))}


def encoder(name: str, inputs=right_padded, **change: object) -> Family:
    return Family(name, BERT | change, "AutoModel", inputs)


def pair(name: str, base: dict, refused: tuple[str, ...] = (), **change: object) -> Family:
    return Family(name, base | change, "AutoModelForSeq2SeqLM", translation, refused)


ENCODERS = [
    *map(encoder, ["bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "eurobert", "gte"]),
    *map(encoder, ["jina_embeddings_v3", "nomic_bert", "roberta", "roberta-prelayernorm", "splinter"]),
    *map(encoder, ["xlm-roberta", "xlm-roberta-xl"]),
    encoder("albert", embedding_size=16),
    encoder("distilbert", dim=32, n_heads=4, n_layers=2, hidden_dim=48),
    encoder("esm", mask_token_id=3, position_embedding_type="rotary"),
    encoder("mobilebert", embedding_size=16, intra_bottleneck_size=16),
    encoder("modernbert", local_attention=4, global_attn_every_n_layers=2, layer_types=["sliding_attention",
                                                                                        "full_attention"]),
    encoder("openai_privacy_filter", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8,
            sliding_window=2),
    encoder("roc_bert", pronunciation_vocab_size=8, shape_vocab_size=8, pronunciation_embed_dim=8, shape_embed_dim=8),
    encoder("xmod", default_language="en_XX", adapter_reduction_factor=2),
    encoder("layoutlm", layout, max_2d_position_embeddings=64),
    encoder("markuplm", markup, max_xpath_tag_unit_embeddings=16, max_xpath_subs_unit_embeddings=16,
            xpath_unit_hidden_size=4,
            max_depth=4, tag_pad_id=8, subs_pad_id=8),
    Family("clip_text_model", BERT | dict(projection_dim=16, bos_token_id=1, eos_token_id=2), "CLIPTextModel",
           right_padded),
]  # fmt: skip

SEQ2SEQ = [
    *(pair(name, LAYERS) for name in ["bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small",
                                      "plbart"]),
    pair("m2m_100", LAYERS),
    pair("nllb-moe", LAYERS, num_experts=4, expert_capacity=64, encoder_sparse_step=2, decoder_sparse_step=2),
    pair("pegasus_x", LAYERS, ("encoder.layers",), num_global_tokens=2, block_size=4),
    pair("bigbird_pegasus", LAYERS, ("encoder.layers",), attention_type="original_full"),
    *(pair(name, T5) for name in ["t5", "mt5", "umt5"]),
    pair("longt5", T5, ("LocalSelfAttention",), local_radius=3, global_block_size=4),
    pair("switch_transformers", T5, num_decoder_layers=2, num_experts=4, expert_capacity=64,
         num_sparse_encoder_layers=1,
         num_sparse_decoder_layers=1),
    pair("t5gemma", dict(vocab_size=64), **{
        side: dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=4,
                   layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16)
        for side in ("encoder", "decoder")}),
]  # fmt: skip
