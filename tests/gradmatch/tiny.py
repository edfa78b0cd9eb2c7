"""Tiny networks with weights drawn from a seed, a classifier and a language model with a word-level tokenizer in folders."""

import copy

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["[PAD]", "[UNK]", "[EOS]"]
WORDS += ["good", "bad", "film", "plot", "the", "a", "was", "very"]
WORDS += ["not", "great", "poor", "fine", "dull", "bright", "slow"]


def gpt2(kind=tf.GPT2LMHeadModel, **sizes):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32, **sizes}
    return kind(tf.GPT2Config(**{"bos_token_id": 1, "eos_token_id": 1, **sizes}))


def llama(vocab_size, **sizes):
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=vocab_size, **small, **sizes))


def text_llama(words):
    """A language model of words whose first is the padding, and its tokenizer."""
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = llama(len(words), max_position_embeddings=16, tie_word_embeddings=True, **ends)
    return model, word_tokenizer(words, words[0], pad_token=words[0])


def tuned(model, seed, scale=0.1):
    """A copy of a module with noise on its parameters."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def word_tokenizer(words, unknown, **special):
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def tokenizer(padding=True):
    extra = {"pad_token": "[PAD]"} if padding else {}
    return word_tokenizer(WORDS, "[UNK]", unk_token="[UNK]", eos_token="[EOS]", **extra)


def save_classifier(folder, classes=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    names = {n: f"class{n}" for n in range(classes)}
    numbers = {name: n for n, name in names.items()}
    sizes |= {"max_position_embeddings": 12, "num_labels": classes, "id2label": names, "label2id": numbers}
    model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=len(WORDS), **sizes))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model.eval()


def save_language_model(folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "n_embd": 8, "n_layer": 1, "n_positions": 12}
    model = gpt2(**sizes, bos_token_id=2, eos_token_id=2)
    model.save_pretrained(folder)
    tokenizer(padding=False).save_pretrained(folder)
    return model.eval()
