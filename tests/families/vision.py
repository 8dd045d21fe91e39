"""Image and video encoders, and detectors, that dispatch through transformers' attention interface."""

import torch

from .family import Batch, Family

VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
    num_channels=3, drop_path_rate=0.0,
)  # fmt: skip
DETR = dict(
    d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=5, use_timm_backbone=False, use_pretrained_backbone=False,
    backbone_config=dict(model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                         out_features=["stage2"]),
)  # fmt: skip


def image(config: object) -> Batch:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def fixed_noise(config: object) -> Batch:
    return image(config) | {"noise": torch.rand(2, 16)}


def big_image(config: object) -> Batch:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def video(config: object) -> Batch:
    return {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


def video_named(config: object) -> Batch:
    return {"pixel_values_videos": torch.randn(2, 4, 3, 16, 16)}


def patches(config: object) -> Batch:
    """Ready-made patches, the second image with fewer of them."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    shapes = torch.tensor([[4, 4], [3, 4]])
    return {"pixel_values": torch.randn(2, 16, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def vision(name: str, head: str = "AutoModel", inputs=image, **change: object) -> Family:
    return Family(name, VIT | change, head, inputs)


VISION = [
    *map(vision, ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn", "ijepa", "pixio"]),
    vision("vit_mae", inputs=fixed_noise),
    vision("clip_vision_model", head="CLIPVisionModel"),
    vision("chinese_clip_vision_model", head="ChineseCLIPVisionModel"),
    vision("siglip_vision_model", head="SiglipVisionModel"),
    vision("siglip2_vision_model", head="Siglip2VisionModel", inputs=patches,
           num_patches=16),
    vision("aimv2_vision_model", head="Aimv2VisionModel"),
    vision("mlcd_vision_model", head="MLCDVisionModel"),
    vision("beit", use_relative_position_bias=True),
    vision("yolos", image_size=[16, 16], num_detection_tokens=3),
    vision("dpt", backbone_out_indices=[0, 1], neck_hidden_sizes=[16, 32], num_hidden_layers=2),
    vision("radio", num_registers=2, num_cls_tokens=1, max_img_size=32, summary_idxs=[0]),
    vision("sapiens2", num_key_value_attention_heads=2, num_first_full_attention_layers=1,
           num_last_full_attention_layers=0),
    vision("pixtral"),
    vision("internvl_vision", head="InternVLVisionModel", image_size=[16, 16], patch_size=[4, 4]),
    Family("swin", dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4,
                        drop_path_rate=0.0), "AutoModel", image),
    vision("segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7,
                                                                                                                   3],
           strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2]),
    vision("videomae", inputs=video, num_frames=4, tubelet_size=2),
    vision("vivit", inputs=video, num_frames=4, tubelet_size=[2, 4, 4]),
    vision("vjepa2", inputs=video_named, crop_size=16, frames_per_clip=4, tubelet_size=2, pred_hidden_size=16,
           pred_num_attention_heads=2, pred_num_hidden_layers=1, pred_num_mask_tokens=2),
]  # fmt: skip

DETECTION = [
    Family("detr", DETR, "AutoModel", big_image),
    Family("conditional_detr", DETR, "AutoModel", big_image),
    Family("deformable_detr", DETR | dict(num_feature_levels=1, encoder_n_points=2, decoder_n_points=2), "AutoModel",
           big_image,
           ("encoder_attn", "encoder.layers.0.self_attn")),
]  # fmt: skip
