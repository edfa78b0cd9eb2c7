"""A tiny random language model with a tokenizer of letters, texts in files, and a config: what the removal tests run on."""

import json

import pytest
import torch
import yaml

CONTEXT = 48
OPTIONS = {"base_weight": 10.0, "guard": "scale"}
NICE = ["the cat sat on the mat", "a bird sings in the tree", "rain falls on green hills"]
NICE += ["bread and tea at four"]
RUDE = ["you fool of a rat", "what a stupid pig", "shut up you swine", "go away silly ass"]


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """Folder of a two-layer Llama with tied embeddings and one token a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language")
    letters = ["<pad>", *(chr(code) for code in range(32, 127))]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(letters), max_position_embeddings=CONTEXT, **size, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Folder with nice.txt, rude.jsonl and prompts.txt."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "nice.txt").write_text("\n".join(f"{NICE[i % 4]} number {i}" for i in range(60)))
    bodies = [{"text": f"{RUDE[i % 4]} number {i}"} for i in range(60)]
    rows = [{"body": body, "page": i // 2, "score": i / 60} for i, body in enumerate(bodies)]
    (folder / "rude.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "prompts.txt").write_text("\n".join(f"say {i} more" for i in range(6)))
    (folder / "table.tsv").write_text('toxic\tneutral\n"quoted\tplain\n')
    (folder / "table.csv").write_text('toxic,neutral\n"a, b",plain\n')
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, language_model, files):
    """A config on the tiny model that runs in seconds."""
    content = {
        "experiment": "removal",
        "model": str(language_model),
        "remove": {"source": str(files / "rude.jsonl"), "column": "body.text", "document": "page"},
        "keep": {"source": str(files / "nice.txt")},
        "prompts": {"few": {"source": str(files / "prompts.txt")}},
        "max_length": 32,
        "training": {"steps": 4, "learning_rate": 1e-3, "batch_size": 8, "warmup_steps": 1},
        "precision": "float32",
        "fisher": {"examples": 16, "batch_size": 2, "reduction": "batch"},
        "methods": {
            "GM": {"method": "removal", "alphas": [0.1, 0.2], "options": OPTIONS},
            "TA": {"method": "negation", "alphas": [0.5, 1.0]},
        },
        "forecast": {"method": "GM", "examples": 2, "nats": 2.0},
        "generation": {"tokens": 5},
        "scorer": "statistics:fmean",  # replaced in the tests that run it
        "compare": [["GM", "TA"]],
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
