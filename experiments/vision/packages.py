"""The packaged vision model (DINOv2-small), rebuilt out of its ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments import assets

POSITIONS = "embeddings.position_embeddings"
PATCHES = "embeddings.patch_embeddings.projection.weight"
NEW_NAMES = {  # names in the file -> in Dinov2Model
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def dinov2(pixels: int, num_labels: int) -> Any:
    """DINOv2-small with a new head, for square images of that many pixels a side (position embeddings interpolated once)."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    weights = read_onnx(next(assets.folder("dinov2").glob("*.onnx")))
    width, patch = weights["embeddings.cls_token"].shape[-1], weights[PATCHES].shape[-1]
    count = weights[POSITIONS].shape[1] - 1
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": sum(name.endswith("norm1.weight") for name in weights),
        "patch_size": patch,
        "use_mask_token": False,
    }
    whole = Dinov2ForImageClassification(Dinov2Config(**shape, image_size=patch * round(count**0.5)))
    if set(whole.dinov2.state_dict()) != set(weights):  # transformers before 5 kept the names of the file
        weights = {_old_name(name): value for name, value in weights.items()}
    whole.dinov2.load_state_dict(weights)
    small = Dinov2ForImageClassification(Dinov2Config(**shape, image_size=pixels, num_labels=num_labels))
    patches = torch.zeros(1, 1 + (pixels // patch) ** 2, width)
    positions = whole.dinov2.embeddings.interpolate_pos_encoding(patches, pixels, pixels)
    small.dinov2.load_state_dict({**weights, POSITIONS: positions.detach().clone()})
    return small


def read_onnx(path: Path) -> dict[str, torch.Tensor]:
    """The trunk's weights by their names in Dinov2Model.

    The export renamed what a MatMul multiplies with, transposed; its name is that of the bias that is added next.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays: dict[str, NDArray[Any]] = {
        value.name: numpy_helper.to_array(value) for value in graph.initializer
    }
    products = {
        node.output[0]: name
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in arrays
    }
    found = {name: value for name, value in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        biases = [name for name in node.input if name.endswith(".bias") and name in arrays]
        factors = [products[name] for name in node.input if name in products]
        if node.op_type == "Add" and biases and factors:
            found[biases[0].removesuffix("bias") + "weight"] = arrays[factors[0]].T
    first = next(value for name, value in arrays.items() if name.startswith("onnx::Concat"))
    rest = next(value for name, value in arrays.items() if name.startswith("onnx::Reshape"))
    found[f"backbone.{POSITIONS}"] = np.concatenate([first, rest], 1)
    return {
        _new_name(name.removeprefix("backbone.")): torch.tensor(np.array(value))
        for name, value in found.items()
    }


def _new_name(name: str) -> str:
    for old, new in NEW_NAMES.items():
        name = name.replace(old, new)
    return name


def _old_name(name: str) -> str:
    for old, new in NEW_NAMES.items():
        name = name.replace(new, old)
    return name
