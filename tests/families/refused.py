"""Models outside the attention interface: hand-written attention, or no attention at all."""

import torch

from .causal import SMALL
from .encoders import BERT, LAYERS, right_padded
from .family import Batch, Family, text, unpadded
from .signals import WAVE, wave
from .vision import VIT, big_image, image

GPT = dict(
    vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
WIDE = LAYERS | dict(d_model=32, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)
STAGES = dict(
    image_size=32, patch_size=4, num_channels=3, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2,
    drop_path_rate=0.0,
)  # fmt: skip


def video(config: object) -> Batch:
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


def lm(name: str, **change: object) -> Family:
    return Family(name, SMALL | change, "AutoModelForCausalLM", text)


def encoder(name: str, inputs=right_padded, **change: object) -> Family:
    return Family(name, BERT | change, "AutoModel", inputs)


# Attention written out by hand (matmul, softmax, matmul): a reading of it would need an adapter for the class.
HAND_WRITTEN = [
    Family("gpt_neo", dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global",
                                                                                                        "local"], 1]],
                           window_size=4, max_position_embeddings=64, intermediate_size=48)),
    Family("gptj", GPT | dict(rotary_dim=4)),
    Family("codegen", GPT | dict(rotary_dim=4)),
    Family("openai-gpt", GPT),
    Family("imagegpt", GPT, "ImageGPTModel", unpadded),
    Family("bloom", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    Family("mpt", dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2)),
    lm("xglm", d_model=32, attention_heads=4, num_layers=2, ffn_dim=48),
    lm("gpt_neox_japanese", intermediate_multiple_size=2),
    Family("xlnet", dict(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48), "XLNetModel"),
    Family("xlm", dict(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, n_langs=1),
           "XLMModel",
           right_padded),
    Family("flaubert", dict(vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, n_langs=1),
           "FlaubertModel", right_padded),
    *map(encoder, ["deberta-v2", "deberta", "mpnet", "megatron-bert", "nystromformer", "roformer"]),
    encoder("rembert", input_embedding_size=16, output_embedding_size=16),
    encoder("longformer", attention_window=4),
    encoder("big_bird", attention_type="original_full"),
    encoder("convbert", embedding_size=32),
    encoder("ibert"),
    encoder("squeezebert", embedding_size=32),
    Family("funnel", dict(vocab_size=64, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48),
           "FunnelModel", right_padded),
    Family("led", WIDE | dict(attention_window=4), "LEDModel", unpadded),
    Family("timesformer", VIT | dict(num_frames=4, drop_path_rate=0), "AutoModel", video),
    Family("swinv2", STAGES, "AutoModel", big_image),
    Family("donut-swin", STAGES, "AutoModel", big_image),
    Family("vitdet", VIT, "AutoModel", image),
    Family("pvt_v2", dict(image_size=32, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32],
                          patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2]),
           "AutoModel", big_image),
]  # fmt: skip

# Their own class calls F.scaled_dot_product_attention or F.multi_head_attention_forward: a function mode reaches them.
FUNCTION_MODE = [
    Family("falcon", dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True)),
    Family("data2vec-vision", VIT | dict(use_relative_position_bias=True), "AutoModel", image),
    Family("sam_vision_model", VIT | dict(output_channels=16, mlp_dim=48, window_size=2, global_attn_indexes=[1],
                                          num_pos_feats=16),
           "SamVisionModel", image),
    Family("wavlm", WAVE | dict(num_buckets=8, max_bucket_distance=16), "AutoModel", wave),
]  # fmt: skip

# No softmax attention anywhere.
WITHOUT_ATTENTION = [
    lm("mamba", state_size=8),
    lm("mamba2", num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, expand=2),
    lm("falcon_mamba", state_size=8),
    lm("rwkv", attention_hidden_size=32),
    Family("convnext", dict(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], drop_path_rate=0.0), "AutoModel",
           big_image),
    Family("resnet", dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), "AutoModel", big_image),
]  # fmt: skip
