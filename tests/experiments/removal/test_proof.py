"""The proofs: exact where theory says so, and stages that measure what they say."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk

from experiments import config as configs
from experiments.pipeline import in_order
from experiments.removal import encoder, proof
from experiments.studies import removal_proof


def rows(folder):
    return {(row["edit"], row["alpha"]): row for row in json.loads((folder / "rows.json").read_text())}


@pytest.mark.parametrize("seed", range(3))
def test_ridge_is_retraining(tmp_path, seed):
    proof.ridge(tmp_path, seed=seed)
    found = rows(tmp_path)
    assert found["GM, full H", 1.0]["distance"] <= 1e-9
    assert found["TA", 1.0]["distance"] >= 1e-2
    assert found["base", 0.0]["distance"] == 1.0


def test_full_removal_is_the_diagonal_rule_on_diagonals():
    generator = torch.Generator().manual_seed(0)
    theta0, tau, h0, h = (torch.rand(7, generator=generator, dtype=torch.float64) + 0.2 for _ in range(4))
    for alpha in (0.3, 1.0, 3.0):  # the last one guarded in places
        bounded = torch.minimum(h, 0.9 * h0 / alpha)
        expected = theta0 - alpha * (h0 + bounded) * tau / (h0 - alpha * bounded)
        found = proof.removal_full(theta0, tau, alpha, h0.diag(), h.diag(), 0.1)
        torch.testing.assert_close(found, expected)


def test_digits_are_split_and_poisoned():
    pytest.importorskip("sklearn", reason="the extra `removal` is not installed")
    data = proof.digits(0, torch.float64)
    assert sum(len(part[1]) for part in (data.keep, data.remove, data.unseen)) == 1797
    assert set(data.remove[1].tolist()) == {(label + 1) % 10 for label in proof.POISONED}
    assert len(data.both[1]) == len(data.keep[1]) + len(data.remove[1])


def test_network_measures_every_edit(tmp_path):
    pytest.importorskip("sklearn", reason="the extra `removal` is not installed")
    proof.network(tmp_path, seed=0, alphas=[1.0], steps=60, tuning_steps=5, learning_rate=1e-3)
    found = rows(tmp_path)
    assert found["retrained", 0.0]["distance"] == found["retrained", 0.0]["kl"] == 0
    assert found["base", 0.0]["distance"] == 1
    assert {edit for edit, _ in found} >= {"GM", "TA", "EWR", "Fisher negation", "fine-tuned on the rest"}
    assert all(row["kl"] >= 0 and 0 <= row["removed"] <= 1 for row in found.values())


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"gradmatch\[removal\]"):
        proof.digits(0, torch.float32)


def test_report_judges_by_the_interval():
    shared = {"kind": "proof", "problem": "ridge", "alpha": 1.0}
    records = [
        {**shared, "seed": seed, "edit": edit, "distance": value + 0.01 * seed}
        for seed in range(3)
        for edit, value in (("GM", 0.1), ("TA", 0.5))
    ]
    text = removal_proof.report(records)
    assert "ridge: distance of GM less that of TA, at alpha = 1: -0.4" in text
    assert "(nearer)" in text


def test_the_config_is_a_plan(tmp_path):
    content = {
        "experiment": "removal-proof",
        "seeds": [0],
        "encoder": {"training": {"steps": 1, "learning_rate": 1e-5}},
    }
    content["encoder"]["tuning"] = content["encoder"]["training"]
    found = removal_proof.cells(configs.check(content, "here"))
    assert {problem for problem, _ in found} == {"ridge", "logistic", "network", "encoder"}
    assert removal_proof.records(configs.check(content, "here"), tmp_path) == []


def test_a_text_that_changed_is_read_again(tiny_texts, tmp_path):
    def key():
        given = [f"encoder.source={tmp_path}", "encoder.keep=[films]", "encoder.remove=songs"]
        config = configs.load(Path("configs/removal-proof.yaml"), given)
        return next(s.key for s in in_order(removal_proof.stages(config)) if s.name == "proof/data")

    for domain in ("films", "songs"):
        (tmp_path / f"{domain}.jsonl").write_text((tiny_texts / f"{domain}.jsonl").read_text())
    first = key()
    assert key() == first
    with (tmp_path / "songs.jsonl").open("a") as file:
        file.write('{"text": "one more", "label": 1}\n')
    assert key() != first


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alphas=[]", "alphas: .*at least 1 item"),
        ("alphas=[-0.5]", r"alphas\.0: .*greater than 0"),
        ("alphas=[0.5, 0.5]", "alphas: 0.5 stands twice"),
        ("encoder.remove=imdb", "encoder: vader has no domain 'imdb'; it has movies"),
        ("encoder.keep=[movies, yelp]", "encoder: vader has no domain 'yelp'"),
        ("encoder.keep=[tweets]", "encoder: 'tweets' stands twice"),
    ],
)
def test_faults(override, message):
    with pytest.raises(configs.ConfigError, match=message):
        configs.load(Path("configs/removal-proof.yaml"), [override])


def test_the_encoder_is_compared_with_one_that_never_saw_the_wrong_labels(
    tmp_path, tiny_encoder, tiny_texts, run
):
    training = {"steps": 30, "learning_rate": 1e-2, "batch_size": 16, "warmup_steps": 1}
    spec = {
        "encoder": str(tiny_encoder),
        "source": str(tiny_texts),
        "max_length": 16,
        "examples": 32,
        "test": 48,
    }
    spec |= {"keep": ["films", "books"], "remove": "songs", "wrong": 40, "training": training}
    spec["tuning"] = {**training, "steps": 4, "learning_rate": 1e-3}
    content = {"experiment": "removal-proof", "seeds": [0], "alphas": [1.0], "encoder": spec}
    content["network"] = {"steps": 20, "tuning_steps": 2}
    (tmp_path / "proof.yaml").write_text(yaml.safe_dump(content))
    records, out = run(tmp_path / "proof.yaml")
    found = {(r["edit"], r["alpha"]): r for r in records if r.get("problem") == "encoder"}
    assert found["retrained", 0.0]["distance"] == found["retrained", 0.0]["kl"] == 0
    assert found["base", 0.0]["distance"] == 1
    assert found["base", 0.0]["removed"] > found["retrained", 0.0]["removed"]  # it learned the wrong labels
    assert {edit for edit, _ in found} >= {"GM", "TA", "EWR", "Fisher negation", "fine-tuned on the rest"}
    assert "encoder (1 seeds)" in out


def test_poison_turns_the_labels_of_one_domain_round(tmp_path):
    data = {split: tmp_path / split for split in ("train", "test")}
    for split, folder in data.items():
        for name in ("films", "songs"):
            rows = Dataset.from_dict({"input_ids": [[1]] * 4, "labels": [0, 1, 0, 1]})
            rows.save_to_disk(folder / name / split)
        (folder / "data.json").write_text('{"domains": {"films": {}, "songs": {}}, "pad": 0}')
    (tmp_path / "out").mkdir()
    encoder.poison(tmp_path / "out", data=data, domain="songs", count=3)
    read = {
        path.parent.name + path.name: load_from_disk(str(path))["labels"]
        for path in (tmp_path / "out").glob("*/*")
    }
    assert list(read["filmstrain"]) == list(read["filmstest"]) == [0, 1, 0, 1]
    assert list(read["songstest"]) == [1, 0, 1, 0]
    assert len(read["songstrain"]) == 3
