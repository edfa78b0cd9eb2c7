"""Tiny models with every weight drawn at random, norm gains and biases too, and a tokenizer of words beside them."""

import copy

import torch
import transformers as tf

from tests.gradmatch.tiny import word_tokenizer

WORDS = [
    "<s>",
    "</s>",
    "<unk>",
    "sum",
    "plus",
    "two",
    "three",
    "once",
    "upon",
    "time",
    "king",
    "queen",
    "a",
    "the",
]
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
PROMPTS = [["sum two plus three", "two plus"], ["once upon a time"], ["the king", "a queen"]]


def drawn(module, seed=0, scale=0.3):
    """Every parameter at random; gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return module.eval()


def moved(module, seed, part="", scale=0.1):
    """A copy with noise on the parameters whose name holds `part`."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if part in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def decoder(config):
    return drawn(tf.AutoModelForCausalLM.from_config(config))


def tokenizer(kind=""):
    if kind.startswith("qwen"):  # transformers takes its own class for these, which reads bytes
        return tf.Qwen2Tokenizer(
            vocab={c: n for n, c in enumerate(["<s>", "</s>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"])}, merges=[]
        )
    return word_tokenizer(WORDS, "<unk>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save(module, folder):
    module.save_pretrained(folder)
    tokenizer(module.config.model_type).save_pretrained(folder)
    return str(folder)


def family(folder, config, experts=3, part=""):
    """base/ and e0/, e1/ ... under a folder; their paths."""
    base = decoder(config)
    paths = [save(moved(base, seed + 1, part), folder / f"e{seed}") for seed in range(experts)]
    return save(base, folder / "base"), paths


@torch.no_grad()
def logits(module, ids, **more):
    return module.eval()(input_ids=ids, **more).logits


IDS = torch.randint(3, 14, (2, 9), generator=torch.Generator().manual_seed(0))
