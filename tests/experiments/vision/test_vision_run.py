"""The vision study on a tiny random model and synthetic images: from raw sets to records, and what its parts promise."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import Dinov2Config, Dinov2ForImageClassification

from experiments import models, rows
from experiments.config import ConfigError, load
from experiments.records import of_kind
from experiments.studies.cells import Cells
from experiments.vision import heads


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with a tiny model, three sets whose classes differ in brightness, and a config."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4}
    model = Dinov2ForImageClassification(Dinov2Config(**shape, image_size=8, use_mask_token=False))
    models.save(model, folder / "model")
    sets = {}
    for seed, name in enumerate(("shapes", "cups", "hats")):
        generator = np.random.default_rng(seed)
        y = np.arange(200) % (2 + seed)
        x = generator.integers(0, 60, (200, 8, 8)) + 60 * y[:, None, None]
        (folder / name).mkdir()
        np.savez(folder / name / "a.npz", x=x.astype(np.uint8), y=y)
        sets[name] = str(folder / name)
    steps = {"steps": 3, "learning_rate": 1e-3, "batch_size": 8, "warmup_steps": 1}
    content = {
        "experiment": "vision",
        "encoder": str(folder / "model"),
        "data": {"base": "shapes", "tasks": ["cups", "hats"], "sets": sets, "pixels": 8},
        "base_training": steps,
        "task_training": steps,
        "joint_training": steps,
        "precision": "float32",
        "fisher": {"examples": 12, "batch_size": 4},
        "mismatch_examples": 12,
        "merges": {
            "TA": {"method": "task_arithmetic"},
            "GM": {"method": "gradient_matching"},
            "RegMean": {"method": "regmean"},
            "GM*": {"method": "gradient_matching", "choose": {"base_weight": [0.1, 1.0]}},
        },
        "sweep": {"merges": ["GM*"], "alphas": [0.5, 1.0], "forecast": 8},
        "compare": [["GM", "TA"]],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def test_a_run_gives_the_records_of_the_sentiment_study(world, run):
    records, out = run(world / "tiny.yaml", where=world / "results")
    assert "GM*" in out
    found = {record["model"]: record for record in of_kind(records, "evaluation")}
    assert list(found) == ["base", "cups", "hats", "joint", "TA", "GM", "RegMean", "GM*"]
    assert found["base"]["metrics"]["shapes"]["accuracy"] > 0.9  # brightness tells, and the head was fitted
    assert set(found["GM"]["metrics"]) == {"shapes", "cups", "hats", "macro", "per_example", "tasks"}
    assert all(math.isfinite(found[name]["mismatch"]["total"]) for name in ("joint", "TA", "GM", "RegMean"))
    (comparison,) = of_kind(records, "comparison")
    assert comparison["tasks"]["low"] <= comparison["tasks"]["difference"] <= comparison["tasks"]["high"]
    (sweep,) = of_kind(records, "sweep")
    accuracy = sweep["points"][1]["metrics"]["macro"]["accuracy"]
    assert accuracy == found["GM*"]["metrics"]["macro"]["accuracy"]  # alpha = 1 is the merge itself
    assert all(math.isfinite(point["forecast"]["mean"]) for point in sweep["points"])
    (told,) = load(world / "tiny.yaml").rows()  # as a dry run counts them
    assert told["rows"] == of_kind(records, "data")[0]["rows"]
    data = next((world / "results" / "stages" / "vision").glob("data-*"))
    assert rows.classes_of(data, "hats") == slice(5, 9)
    head = {
        name: models.load_classifier(record["folder"]).classifier.weight
        for name, record in found.items()
        if name in ("base", "cups", "joint", "GM")
    }
    for name in ("cups", "joint", "GM"):  # one head, fitted on the base's features
        torch.testing.assert_close(head[name], head["base"])


def test_a_probe_is_the_minimum_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    weight, bias = heads.fit_probe(x, labels, 3, ridge=0.1)
    scale = x.double().square().mean().sqrt()
    w, b = (weight * scale).requires_grad_(), bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() / scale @ w.T + b, labels) + 0.05 * w.square().sum()
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert gradient.abs().max() < 1e-4


def test_the_loss_sees_the_classes_of_the_labels_own_set():
    loss = heads.CommonHeadLoss({"a": {"classes": "xy"}, "b": {"classes": "xyz"}})
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    owners = (slice(0, 2), slice(0, 2), slice(2, 5), slice(2, 5))
    each = [
        torch.nn.functional.cross_entropy(logits[i : i + 1, own], labels[i : i + 1] - own.start)
        for i, own in enumerate(owners)
    ]
    torch.testing.assert_close(loss(SimpleNamespace(logits=logits), labels), torch.stack(each).mean())


def test_weights_are_saved_under_the_names_that_curvature_has(world):
    from safetensors import safe_open

    with safe_open(world / "model" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(models.load_classifier(world / "model").state_dict())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tasks=[cups, cup]", "no set 'cup': packages hold animals"),
        ("data.tasks=[shapes]", "`base` and `tasks` must differ"),
        ("data.pixel=8", r"data.pixel: unknown key \(did you mean 'pixels'"),
        ("encoder=dinov2", "data.pixels is 8, but dinov2 takes multiples of 14"),
        ("merges.TA.method=kronecker", "kronecker needs Kronecker factors"),
    ],
)
def test_faults(world, override, message):
    with pytest.raises(ConfigError, match=message):
        load(world / "tiny.yaml", [override])


def test_a_set_that_changed_is_read_again(world, tmp_path):
    def key(where):
        config = load(world / "tiny.yaml", [f"data.sets.hats={where}"])
        return Cells(config).data["train"].key

    np.savez(tmp_path / "a.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.arange(4) % 2)
    first = key(tmp_path)
    assert key(tmp_path) == first
    np.savez(tmp_path / "a.npz", x=np.ones((4, 8, 8), np.uint8), y=np.arange(4) % 2)
    assert key(tmp_path) != first


def test_a_hub_model_without_network_names_what_stands_in():
    with pytest.raises(FileNotFoundError, match="encoder=dinov2 stands in"):
        heads.new_classifier("no/such-model", 8, 2)


def test_redundancy_and_analogies_of_the_same_models(world, run):
    analogy = {"source": "images", "a": "cups", "b": "hats", "c": "cups", "target": "cups on photographs"}
    content = {"experiment": "redundancy", "sources": {"images": str(world / "tiny.yaml")}}
    content |= {"shares": [0.0, 0.9], "analogies": {"cups outside": analogy}}
    (world / "redundancy.yaml").write_text(yaml.safe_dump(content))
    found, out = run(world / "redundancy.yaml", where=world / "results")
    assert "cups + w (hats - cups) on cups on photographs" in out
    assert {record["task"] for record in of_kind(found, "redundancy")} == {"cups", "hats"}
    (points,) = (record["points"] for record in of_kind(found, "analogy"))
    assert [point["weight"] for point in points] == [0.3, 0.6, 1.0]


def test_light_modules_know_the_names_that_heavy_ones_use():
    from experiments import redundancy
    from experiments.studies import redundancy as redundancy_study
    from experiments.studies import vision as vision_study
    from experiments.vision import sets

    assert tuple(sets.PACKAGED) == vision_study.PACKAGED
    assert redundancy.PHOTOGRAPHS == redundancy_study.PHOTOGRAPHS
