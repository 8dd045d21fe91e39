"""Models of two modalities that dispatch through transformers' attention interface, in both halves."""

import torch

from .causal import SMALL
from .encoders import BERT
from .family import Batch, Family, text
from .vision import VIT

LLAMA = SMALL | dict(model_type="llama")
QWEN_TEXT = SMALL | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))
QWEN_VISION = dict(
    depth=2, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, intermediate_size=48, out_hidden_size=32,
    window_size=16, fullatt_block_indexes=[1], num_position_embeddings=16, deepstack_visual_indexes=[0],
)  # fmt: skip
QWEN_TOKENS = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
IMAGE_TOKEN = 60


def with_image(tokens: int, side: int = 16, **extra: torch.Tensor):
    """Text with `tokens` image placeholders after the first three words; the second sentence is padded on the left."""

    def inputs(config: object) -> Batch:
        batch = text(config, n=12 + tokens)
        batch["input_ids"][:, 4 : 4 + tokens] = IMAGE_TOKEN
        return batch | {"pixel_values": torch.randn(2, 3, side, side)} | extra

    return inputs


def dual(config: object) -> Batch:
    return {**text(config, padding="right"), "pixel_values": torch.randn(2, 3, 16, 16)}


def qwen_images(config: object) -> Batch:
    """Two images of different size, as flat patches, one in each sentence."""
    batch = text(config, n=18)
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    batch["input_ids"][0, 5:9] = IMAGE_TOKEN
    batch["input_ids"][1, 5:13] = IMAGE_TOKEN
    batch["input_ids"][:, 4] = QWEN_TOKENS["vision_start_token_id"]
    kinds = (batch["input_ids"] == IMAGE_TOKEN).int()
    return batch | {"pixel_values": torch.randn(48, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds}


def tiled(config: object) -> Batch:
    batch = with_image(4)(config)
    return batch | {"pixel_values": torch.randn(2, 1, 3, 16, 16)}


def gemma_images(config: object) -> Batch:
    batch = with_image(4)(config)
    return batch | {"token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}


TOWER = dict(model_type="clip_vision_model", projection_dim=16) | VIT
SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False) | VIT
CLIP_TEXT = BERT | dict(projection_dim=16, bos_token_id=1, eos_token_id=2)

MULTIMODAL = [
    Family("clip", dict(text_config=CLIP_TEXT, vision_config=VIT | dict(projection_dim=16), projection_dim=16),
           "AutoModel", dual),
    Family("metaclip_2", dict(text_config=CLIP_TEXT, vision_config=VIT | dict(projection_dim=16), projection_dim=16),
           "AutoModel", dual),
    Family("siglip", dict(text_config=BERT | dict(projection_size=32), vision_config=VIT), "AutoModel", dual),
    Family("owlvit", dict(text_config=BERT | dict(bos_token_id=1, eos_token_id=2), vision_config=VIT,
                          projection_dim=16), "AutoModel", dual),
    Family("aimv2", dict(text_config=BERT | dict(eos_token_id=2), vision_config=VIT, projection_dim=16), "AutoModel",
           dual),
    Family("llava", dict(text_config=LLAMA, vision_config=TOWER, image_token_index=60, vision_feature_layer=-1),
           "AutoModelForImageTextToText", with_image(16)),
    Family("vipllava", dict(text_config=LLAMA, vision_config=TOWER, image_token_index=60,
                            vision_feature_layers=[-1, -2]),
           "AutoModelForImageTextToText", with_image(16)),
    Family("paligemma", dict(text_config=SMALL | dict(model_type="gemma"),
                             vision_config=SIGLIP | dict(projection_dim=32),
                             image_token_index=60, projection_dim=32, hidden_size=32, vocab_size=64),
           "AutoModelForImageTextToText", with_image(16)),
    Family("gemma3", dict(text_config=SMALL | dict(model_type="gemma3_text", sliding_window=4, query_pre_attn_scalar=16,
                                                   layer_types=["sliding_attention", "full_attention"]),
                          vision_config=SIGLIP, image_token_index=60, mm_tokens_per_image=4, boi_token_index=61,
                          eoi_token_index=62),
           "AutoModelForImageTextToText", gemma_images),
    Family("mistral3", dict(text_config=SMALL | dict(model_type="mistral"),
                            vision_config=dict(model_type="pixtral") | VIT,
                            image_token_index=60, spatial_merge_size=2, vision_feature_layer=-1),
           "AutoModelForImageTextToText", with_image(4, image_sizes=torch.tensor([[16, 16], [16, 16]]))),
    Family("internvl", dict(text_config=SMALL | dict(model_type="qwen2"), image_token_id=60, image_seq_length=4,
                            vision_config=VIT | dict(image_size=[16, 16], patch_size=[4, 4])),
           "AutoModelForImageTextToText", with_image(4)),
    Family("idefics3", dict(text_config=LLAMA, vision_config=VIT, image_token_id=60, scale_factor=2),
           "AutoModelForImageTextToText", tiled),
    Family("smolvlm", dict(text_config=LLAMA, vision_config=VIT, image_token_id=60, scale_factor=2),
           "AutoModelForImageTextToText", tiled),
    Family("qwen2_vl", dict(text_config=QWEN_TEXT, vision_config=QWEN_VISION) | QWEN_TOKENS,
           "AutoModelForImageTextToText", qwen_images),
    Family("qwen2_5_vl", dict(text_config=QWEN_TEXT, vision_config=QWEN_VISION) | QWEN_TOKENS,
           "AutoModelForImageTextToText", qwen_images),
    Family("qwen3_vl", dict(text_config=QWEN_TEXT, vision_config=QWEN_VISION) | QWEN_TOKENS,
           "AutoModelForImageTextToText", qwen_images),
    Family("blip-2", dict(text_config=SMALL | dict(model_type="opt", ffn_dim=48, word_embed_proj_dim=32),
                          vision_config=VIT, qformer_config=BERT | dict(encoder_hidden_size=32), num_query_tokens=4,
                          image_token_index=60),
           "Blip2ForConditionalGeneration", with_image(4)),
]  # fmt: skip
