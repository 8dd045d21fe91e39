"""Causal language models that dispatch through transformers' attention interface."""

from .family import Family

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_routed_experts=4)
LATENT = dict(
    kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, num_key_value_heads=4,
    n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=8,
)  # fmt: skip
INDEXED = LATENT | dict(index_topk=4, index_head_dim=16, index_n_heads=2)
MAMBA = dict(mamba_d_state=8, mamba_d_head=16, mamba_n_heads=4, mamba_chunk_size=8, mamba_expand=2, mamba_dt_rank=4)
GATED = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
WINDOWS = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])

PLAIN = """
apertus arcee beam biogpt bitnet cohere ctrl exaone4 ernie4_5 flint gemma glm glm4 gpt2 gpt_bigcode gpt_neox granite
granite_swa helium hunyuan_v1_dense hyperclovax jais2 llama nanochat nemotron olmo olmo2 opt
persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 diffllama vaultgemma
""".split()
MIXTURES = """
aria_text cohere2_moe ernie4_5_moe exaone_moe flex_olmo glm4_moe granitemoe granitemoeshared granitemoe_swa
hunyuan_v1_moe hy_v3 jetmoe laguna mellum minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open afmoe
""".split()
CHANGES = {
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "ctrl": dict(dff=48, n_positions=64),
    "qwen2_moe": dict(shared_expert_intermediate_size=16),
}
OTHERS = {
    # windows, caps, sinks, chunks
    "mistral": dict(sliding_window=4),
    "ministral": WINDOWS,
    "ministral3": {},
    "gemma2": WINDOWS | dict(query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
    "gemma3_text": WINDOWS | dict(query_pre_attn_scalar=16),
    "gemma4_text": WINDOWS | dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, global_head_dim=16,
                                  num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
                                  num_kv_shared_layers=2),
    "gemma3n_text": WINDOWS | dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=8,
                                   num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
                                   num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4,
                                   intermediate_size=[48] * 4),
    "gpt_oss": EXPERTS | WINDOWS,
    "olmo3": WINDOWS,
    "cohere2": WINDOWS,
    "cwm": WINDOWS,
    "mimo_v2_flash": EXPERTS | WINDOWS,
    "modernbert-decoder": dict(local_attention=4, global_attn_every_n_layers=2),
    "llama4_text": EXPERTS | dict(attention_chunk_size=4, layer_types=["chunked_attention", "full_attention"],
                                  intermediate_size_mlp=48),
    "doge": dict(keep_window_size=64),
    "dots1": EXPERTS | WINDOWS | dict(n_shared_experts=1),
    # latent attention, with and without a sparse indexer
    "deepseek_v2": EXPERTS | LATENT,
    "deepseek_v3": EXPERTS | LATENT,
    "glm4_moe_lite": EXPERTS | LATENT,
    "youtu": LATENT,
    "minicpm3": LATENT,
    "longcat_flash": LATENT | dict(num_layers=1, n_routed_experts=4, zero_expert_num=2, moe_topk=2,
                                   ffn_hidden_size=48, expert_ffn_hidden_size=16),
    "axk1": EXPERTS | LATENT,
    "deepseek_v32": EXPERTS | INDEXED,
    "glm_moe_dsa": EXPERTS | INDEXED,
    # hybrids: only the softmax layers are attention
    "jamba": EXPERTS | MAMBA | dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
                                    use_mamba_kernels=False),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "granitemoehybrid": EXPERTS | MAMBA | dict(layer_types=["mamba", "attention"], shared_intermediate_size=16),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64),
    "zamba2": MAMBA | dict(n_mamba_heads=4, mamba_headdim=16, num_hidden_layers=4, adapter_rank=4, chunk_size=8,
                           layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], attention_head_dim=16),
    "qwen3_next": EXPERTS | GATED,
    "qwen3_5_text": GATED,
    "qwen3_5_moe_text": EXPERTS | GATED,
    "minimax": EXPERTS | dict(block_size=4),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_multiple_of=8),
    "lfm2_moe": EXPERTS | dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "olmo_hybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "nemotron_h": dict(layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=16,
                       ssm_state_size=8, n_groups=1, chunk_size=8),
    "recurrent_gemma": dict(num_hidden_layers=3, attention_window_size=4, lru_width=32),
    "kimi_linear": EXPERTS | LATENT | dict(linear_head_dim=8, linear_num_heads=4, n_shared_experts=1,
                                           layer_types=["linear_attention", "full_attention"]),
    # several visits of one layer in a forward
    "hrm_text": {},
    "dbrx": dict(d_model=32, hidden_size=32, n_heads=4, n_layers=2, max_seq_len=64, ffn_hidden_size=48,
                 attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0), ffn_config=dict(ffn_hidden_size=16,
                                                                                                   moe_num_experts=4,
                                                                                    moe_top_k=2)),
    "deepseek_v4": EXPERTS,
}  # fmt: skip

CAUSAL = [
    *(Family(name, SMALL | CHANGES.get(name, {})) for name in PLAIN),
    *(Family(name, SMALL | EXPERTS | CHANGES.get(name, {})) for name in MIXTURES),
    *(Family(name, SMALL | change) for name, change in OTHERS.items()),
]
