"""The vision model out of its ONNX file: exact on a tiny one, whatever the export did to the names."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model

from experiments.vision import packages


def export(model, path):
    """A file as the packaged one: products transposed and renamed, position embeddings in two parts."""
    nodes, values = [], []
    for number, (name, value) in enumerate(model.state_dict().items()):
        name = packages._old_name(name)
        array = value.numpy()
        if name == packages.POSITIONS:
            values += [("onnx::Concat_1", array[:, :1]), ("onnx::Reshape_2", array[:, 1:])]
        elif array.ndim == 2:
            values.append((f"onnx::MatMul_{number}", array.T.copy()))
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"product{number}"]))
            bias = "backbone." + name.replace(".weight", ".bias")
            nodes.append(helper.make_node("Add", [bias, f"product{number}"], [f"sum{number}"]))
        else:
            values.append((f"backbone.{name}", array))
    values.append(("decoder.conv.weight", np.zeros((2, 2), np.float32)))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(array, name) for name, array in values]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, [], tensors)), str(path))


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A tiny DINOv2 for images of 4 x 4 patches, and its file where the package's would lie."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "patch_size": 2}
    model = Dinov2Model(Dinov2Config(**shape, image_size=8, use_mask_token=False)).eval()
    export(model, tmp_path / "model.onnx")
    monkeypatch.setattr(packages.assets, "folder", lambda name: tmp_path)
    return model


def test_the_rebuilt_model_computes_what_the_original_does(original):
    rebuilt = packages.dinov2(8, 5).eval()
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected, found = original(images).last_hidden_state, rebuilt.dinov2(images).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert rebuilt.classifier.weight.shape[0] == 5


def test_position_embeddings_of_smaller_images_are_those_that_the_model_would_interpolate(original):
    images = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = original(images).last_hidden_state
        found = packages.dinov2(4, 2).eval().dinov2(images).last_hidden_state
    torch.testing.assert_close(found, expected)
