"""Image models whose files call their parameters otherwise than their modules do."""

import pytest
import torch

from gradmatch import Task, merge, open_checkpoint
from gradmatch.estimators import estimate
from gradmatch.models.renamed import file_names


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A base and a task: modules as loaded, their folders and curvature files."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2,
        num_channels=1, num_labels=2, hidden_dropout_prob=0.0,
    )  # fmt: skip
    modules = {}
    for name in ("base", "task"):
        ViTForImageClassification(config).save_pretrained(folder / name)
        modules[name] = ViTForImageClassification.from_pretrained(folder / name)
        batch = {"pixel_values": torch.randn(6, 1, 4, 4), "labels": torch.arange(6) % 2}
        estimate(modules[name], [batch], progress=False).save(folder / f"{name}.safetensors")
    return folder, modules


def test_folders_merge_as_their_modules_do(vit):
    folder, modules = vit
    base, task = (str(folder / name) for name in ("base", "task"))
    h0, h = (str(folder / f"{name}.safetensors") for name in ("base", "task"))
    of_files = merge(base, Task(task, h), base_curvature=h0)
    of_modules = merge(modules["base"], Task(modules["task"], h), base_curvature=h0)
    names = file_names(open_checkpoint(base), of_modules)
    assert all(torch.equal(of_files[names.get(name, name)], value) for name, value in of_modules.items())


def test_a_curvature_of_other_weights_is_still_refused(vit):
    folder, _ = vit
    base, task = (str(folder / name) for name in ("base", "task"))
    h = str(folder / "base.safetensors")
    with pytest.raises(ValueError, match="taken at other weights than task"):
        merge(base, Task(task, h), base_curvature=h)


def test_names_that_cannot_be_asked_for():
    class Folder(dict):
        config: dict | None = None

    folder = Folder(a=1)
    for config in (
        None,
        {},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["ViTModel"], "hidden_size": "wide"},
    ):
        folder.config = config
        assert file_names(folder, ["a", "b"]) == {}
