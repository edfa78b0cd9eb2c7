"""A tiny world for whole runs: a random BERT with its tokenizer, synthetic texts in three domains, a small config."""

import json
import random

import pytest
import yaml

POSITIVE, NEGATIVE = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
TOPICS = {
    "films": ("film", "actor", "scene", "plot"),
    "books": ("book", "page", "story", "author"),
    "songs": ("song", "tune", "voice", "chorus"),
}
FILLERS = tuple(f"word{i}" for i in range(40))


def synthetic(domain, count, seed):
    """Rows of text, label, document: the label is the sign of the text's adjectives."""
    generator = random.Random(f"{domain}{seed}")
    rows = []
    for number in range(count):
        label = number % 2
        adjectives = generator.choices((NEGATIVE, POSITIVE)[label], k=2)
        words = [*adjectives, *generator.choices(TOPICS[domain], k=2), *generator.choices(FILLERS, k=6)]
        generator.shuffle(words)
        rows.append({"text": " ".join(words), "label": label, "document": str(number // 2)})
    return rows


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """Folder of a random 2-layer BERT with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = [*POSITIVE, *NEGATIVE, *(word for topic in TOPICS.values() for word in topic), *FILLERS]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    words_to_ids = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words_to_ids.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    words_to_ids.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_to_ids, **special)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"max_position_embeddings": 32, "initializer_range": 0.3}
    config = BertConfig(vocab_size=len(tokenizer), **sizes)
    torch.manual_seed(0)  # the same encoder whichever test asks for it first
    BertModel(config, add_pooling_layer=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory):
    """Folder with one JSON-lines file per domain."""
    folder = tmp_path_factory.mktemp("texts")
    for domain in TOPICS:
        rows = synthetic(domain, 240, 0)
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def tiny_config(tmp_path, tiny_encoder, tiny_texts):
    """A sentiment config on the tiny world, in a folder of configs."""
    training = {"steps": 10, "learning_rate": 1e-2, "batch_size": 16, "warmup_steps": 1}
    content = {
        "experiment": "sentiment",
        "encoder": str(tiny_encoder),
        "data": {"source": str(tiny_texts), "base": "films", "tasks": ["books", "songs"], "max_length": 16},
        "base_training": training,
        "task_training": training,
        "joint_training": training,
        "precision": "float32",
        "fisher": {"examples": 24, "batch_size": 8},
        "mismatch_examples": 16,
        "merges": {
            "AM": {"method": "averaging"},
            "TA": {"method": "task_arithmetic"},
            "GM": {"method": "gradient_matching"},
            "GM*": {"method": "gradient_matching", "choose": {"base_weight": [0.1, 1.0]}},
        },
        "sweep": {"merges": ["TA", "GM*"], "alphas": [0.5, 1.0], "forecast": 32},
        "compare": [["GM", "TA"]],
    }
    folder = tmp_path / "configs"
    folder.mkdir()
    path = folder / "tiny.yaml"
    path.write_text("# tiny: one core, 0 minutes\n" + yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def beside(tiny_config):
    """Write another config into the folder of the tiny one: `beside(name, **content)` gives its path."""

    def write(name, **content):
        path = tiny_config.with_name(f"{name}.yaml")
        path.write_text(yaml.safe_dump({"experiment": name, **content}, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """One folder of results for all tests: what one computes, the next find cached."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def run(results, capsys):
    """Run a config, with overrides: (its records, what it printed)."""
    from experiments.__main__ import main
    from experiments.records import read_records

    def command(path, *overrides, where=results, options=()):
        code = main(["run", str(path), *overrides, "--results", str(where), "--debug", *options])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        named = next((o.removeprefix("name=") for o in overrides if o.startswith("name=")), path.stem)
        return read_records(where / f"{named}.jsonl"), captured.out

    return command
