"""Models of one's own: taken as they are, modules and rules by name, adapters, decoders; heads that do not fit are refused."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from experiments import models, rows
from experiments.__main__ import main
from experiments.config import ConfigError, load
from experiments.evaluate import predict
from experiments.records import of_kind
from experiments.studies.cells import Cells

SMALL = ["sweep=null", "compare=[]"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The folder of own_parts.py can be imported from."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def by_model(records):
    return {record["model"]: record for record in of_kind(records, "evaluation")}


def test_models_that_are_there_are_taken_and_not_trained(run, tiny_config):
    trained = by_model(run(tiny_config)[0])
    own = {task: trained[task]["folder"] for task in ("books", "songs")}
    given = [
        "~base_training",
        "~task_training",
        "~joint_training",
        f"models={own}",
        f"encoder={trained['base']['folder']}",
    ]
    parts = ["evaluation=own_parts:sizes", "fisher={method: kfac, examples: 24, options: {labels: sampled}}"]
    merges = "merges={TA: {method: task_arithmetic}, K: {method: kronecker}, H: {method: 'own_parts:HALF'}, S: {method: task_arithmetic, alpha: 0.5}}"
    assert not [
        s
        for s in Cells(load(tiny_config, [*given, *parts, *SMALL, merges])).all()
        if "finetune:finetune" in s.function
    ]
    records, out = run(tiny_config, *given, *parts, *SMALL, merges, "name=taken")
    found = by_model(records)
    assert list(found) == ["base", "books", "songs", "TA", "K", "H", "S"]
    for name in ("base", "books", "songs", "TA"):
        assert found[name]["metrics"]["macro"]["nll"] == trained[name]["metrics"]["macro"]["nll"]
    assert found["H"]["metrics"]["macro"] == pytest.approx(
        found["S"]["metrics"]["macro"], abs=1e-5
    )  # a rule of one's own
    assert found["K"]["own"]["weights"] == found["base"]["own"]["weights"] > 1000
    assert "weights" in out
    assert "distance_to_joint" not in found["TA"]


def test_a_module_of_ones_own_is_trained_merged_and_measured(run, tiny_config, tiny_encoder):
    given = ["encoder=own_parts:bag", f"data.tokenizer={tiny_encoder}", "~joint_training", "name=bag", *SMALL]
    found = by_model(run(tiny_config, *given)[0])
    assert found["base"]["metrics"]["films"]["nll"] != found["books"]["metrics"]["films"]["nll"]
    assert set(found["GM"]["mismatch"]["tasks"]) == {"books", "songs"}
    assert isinstance(models.load_classifier(found["GM"]["folder"]).words, torch.nn.Embedding)


def test_adapters_are_trained_and_merged_into_the_model(run, tiny_config):
    given = [
        "task_training.lora={rank: 2}",
        "~joint_training",
        "merges={TA: {method: task_arithmetic}}",
        "name=lora",
        *SMALL,
    ]
    found = by_model(run(tiny_config, *given)[0])
    base, task = (models.load_classifier(found[name]["folder"]).state_dict() for name in ("base", "books"))
    assert set(base) == set(task)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.linalg.matrix_rank(task[name] - base[name], atol=1e-5) == 2
    assert torch.equal(
        base["bert.embeddings.word_embeddings.weight"], task["bert.embeddings.word_embeddings.weight"]
    )
    assert not torch.equal(base["classifier.weight"], task["classifier.weight"])


def test_a_decoder_reads_the_last_token_whatever_fills_up(tmp_path, tiny_encoder):
    """Predictions do not depend on which texts are in a batch."""
    from datasets import Dataset

    torch.manual_seed(0)
    shape = {
        "vocab_size": 70,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=3, pad_token_id=7)).eval()
    ids = [[5, 9, 12, 30, 31], [8, 0, 0], [40], [5, 6]]
    table = {"input_ids": ids, "attention_mask": [[1] * len(own) for own in ids], "labels": [0, 1, 2, 0]}
    together, _ = predict(model, rows.Texts(Dataset.from_dict(table), pad=7))
    for number in range(4):
        alone = {name: values[number : number + 1] for name, values in table.items()}
        found, _ = predict(model, rows.Texts(Dataset.from_dict(alone), pad=7))
        assert found[0] == pytest.approx(together[number], abs=1e-6)


def headed(folder, names, encoder):
    config = BertConfig(
        vocab_size=70,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=dict(enumerate(names)),
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return str(folder)


def test_a_head_is_compared_with_the_classes_of_the_data(tmp_path, tiny_encoder):
    path = headed(tmp_path, ["bad", "good"], tiny_encoder)
    assert models.check_head(path, ["Bad", "good"])
    assert models.check_head(headed(tmp_path / "n", ["LABEL_0", "LABEL_1"], tiny_encoder), ["bad", "good"])
    assert not models.check_head(str(tiny_encoder), ["bad", "good"])
    with pytest.raises(
        ValueError, match=r"in this order, those of the data good, bad: say data\.labels=\[bad, good\]"
    ):
        models.check_head(path, ["good", "bad"])
    for other in (["0", "1"], ["bad", "good", "mid"]):
        with pytest.raises(ValueError, match=r"has a head for 2 classes \(bad, good\), but the data have"):
            models.check_head(path, other)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["~task_training"], "`task_training` is missing, and `models` has no 'books'"),
        (["models={boks: x}"], "`models` names 'boks', but the models are base, books, songs, joint"),
        (["models={joint: x}"], "`joint_training` trains nothing: `models` has"),
        (
            ["~joint_training", "compare=[[GM, joint]]"],
            "`compare` names 'joint', but the models are base, books, songs, AM",
        ),
        (["fisher.method=fishr"], "unknown method 'fishr'"),
        (["fisher.options={label: sampled}"], r"`options` has no 'label' \(did you mean 'labels'"),
        (
            ["merges.K.method=kronecker"],
            "kronecker needs Kronecker factors, which this study does not estimate",
        ),
        (["fisher.method=gram", "merges.M.method=measured"], "measured needs measured gradients"),
        (
            ["merges.TA={method: task_arithmetic, options: {scale: 1}, choose: {scale: [1]}}"],
            "'scale' is given and chosen",
        ),
        (
            ["merges.TA={method: task_arithmetic, alpha: 1, choose: {alpha: [1]}}"],
            "'alpha' is given and chosen",
        ),
    ],
)
def test_faults(tiny_config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(tiny_config, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder=own_parts:words"], "cannot load|takes|must|words"),
        (["evaluation=own_parts:words"], r"own_parts:words must return numbers by name"),
        (["models={books: nowhere/model}"], "cannot load a model from nowhere/model|nowhere/model"),
    ],
)
def test_parts_that_are_none_fail_by_name(tiny_config, tmp_path, capsys, overrides, message):
    small = ["merges={TA: {method: task_arithmetic}}", "~joint_training", *SMALL, "data.max_length=8"]
    main(["run", str(tiny_config), *small, *overrides, "--results", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("../nowhere", r"encoder: no folder \.\./nowhere"),
        ("{}/encodr", r"encoder: no folder .*encodr \(did you mean 'encoder'"),
        ("{}", "encoder: .* is a folder without config.json, so it holds no model"),
    ],
)
def test_a_mistyped_folder_ends_before_anything_runs(tmp_path, tiny_config, capsys, given, message):
    (tmp_path / "encoder").mkdir()
    assert (
        main(["run", str(tiny_config), f"encoder={given.format(tmp_path)}", "--results", str(tmp_path / "r")])
        == 2
    )
    assert re.search(message, capsys.readouterr().err)


def test_a_plan_of_many_hours_asks(tmp_path, tiny_config, capsys):
    given = ["fisher.examples=999999", "--results", str(tmp_path / "r")]
    assert main(["run", str(tiny_config), *given]) == 2
    assert re.search(r"planned to take \d+ minutes .*: say --yes to run it", capsys.readouterr().err)
