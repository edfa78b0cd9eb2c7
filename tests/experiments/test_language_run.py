"""Language models: tasks are corpora of texts, trained whole or by adapters, merged, and compared by their losses."""

import json

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments.config import ConfigError, load
from experiments.evaluate import predict_texts
from experiments.records import of_kind
from experiments.rows import Language

TRAINING = {"steps": 12, "learning_rate": 1e-2, "batch_size": 16, "warmup_steps": 1}


@pytest.fixture
def language(tmp_path, tiny_encoder, tiny_texts):
    """A config on a tiny decoder: a file of lines, and rows of JSON."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **special)).save_pretrained(
        tmp_path / "decoder"
    )
    tokenizer.save_pretrained(tmp_path / "decoder")
    rows = [json.loads(line) for line in (tiny_texts / "songs.jsonl").read_text().splitlines()]
    (tmp_path / "songs.txt").write_text("\n".join(row["text"] for row in rows))
    corpora = {
        "films": str(tiny_texts / "films.jsonl"),
        "books": {"source": str(tiny_texts / "books.jsonl"), "document": "document"},
    }
    corpora["songs"] = str(tmp_path / "songs.txt")
    content = {
        "experiment": "language",
        "encoder": str(tmp_path / "decoder"),
        "data": {
            "corpora": corpora,
            "base": "films",
            "tasks": ["books", "songs"],
            "max_length": 16,
            "validation": 30,
            "test": 40,
        },
        "base_training": TRAINING,
        "task_training": {**TRAINING, "lora": {"rank": 2}},
        "precision": "float32",
        "fisher": {"examples": 16, "batch_size": 8},
        "mismatch_examples": 16,
        "merges": {"TA": {"method": "task_arithmetic"}, "GM": {"method": "gradient_matching"}},
        "compare": [["GM", "TA"]],
    }
    path = tmp_path / "language.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_run_merges_language_models(language, run, tmp_path):
    records, out = run(language, where=tmp_path / "results")
    found = {record["model"]: record for record in of_kind(records, "evaluation")}
    assert list(found) == ["base", "books", "songs", "TA", "GM"]
    assert found["books"]["metrics"]["books"]["nll"] < found["base"]["metrics"]["books"]["nll"]
    assert found["base"]["metrics"]["films"]["n"] == 40
    (comparison,) = of_kind(records, "comparison")
    losses = [found[name]["metrics"]["macro"]["nll"] for name in ("GM", "TA")]
    assert comparison["difference"] == pytest.approx(losses[0] - losses[1], abs=1e-6)
    assert comparison["quantity"] == "nll"
    assert "nats: difference of macro loss a token, less is better" in out
    assert (records[1]["kind"], records[1]["rows"]["songs"]["validation"]) == ("data", {"texts": 30})
    assert set(found["GM"]["mismatch"]["tasks"]) == {"books", "songs"}


def test_losses_are_per_text_and_leave_contexts_and_padding_out():
    from datasets import Dataset

    torch.manual_seed(0)
    shape = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    ids, contexts = [[1, 2, 3, 4, 5], [6, 7], [3, 3, 8]], [2, 0, 1]
    columns = {
        "input_ids": ids,
        "attention_mask": [[1] * len(own) for own in ids],
        "context": contexts,
        "labels": [0] * 3,
    }
    metrics, found = predict_texts(model, Language(Dataset.from_dict(columns)))
    for own, context, loss in zip(ids, contexts, found["nll"], strict=True):
        labels = torch.tensor([[-100] * context + own[context:]])
        assert float(model(torch.tensor([own]), labels=labels).loss) == pytest.approx(loss, abs=1e-5)
    assert metrics["nll"] == pytest.approx(found["nll"].mean())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tasks=[books, poems]", "`corpora` has no 'poems'; it has"),
        ("data.corpora.books.colum=x", r"data\.corpora\.books\.colum: unknown key \(did you mean 'column'"),
        ("~encoder", "encoder: Field required"),
    ],
)
def test_faults(language, override, message):
    with pytest.raises(ConfigError, match=message):
        load(language, [override])
