"""A tiny saved classifier and language model with a word-level tokenizer, for tests that need a folder."""

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [
    "[PAD]",
    "[UNK]",
    "[EOS]",
    *[
        "good",
        "bad",
        "film",
        "plot",
        "the",
        "a",
        "was",
        "very",
        "not",
        "great",
        "poor",
        "fine",
        "dull",
        "bright",
        "slow",
    ],
]


def tokenizer(padding=True):
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    extra = {"pad_token": "[PAD]"} if padding else {}
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]", **extra)


def save_classifier(folder, classes=2):
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=12, num_labels=classes, id2label={n: f"class{n}" for n in range(classes)},
        label2id={f"class{n}": n for n in range(classes)},
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model.eval()


def save_language_model(folder):
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=12, bos_token_id=2, eos_token_id=2
    )
    model = tf.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer(padding=False).save_pretrained(folder)
    return model.eval()
