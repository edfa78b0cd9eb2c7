"""Text classifiers in folders: curvature beside the weights, a merge into a folder, and the folder loaded by transformers."""

import csv
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from gradmatch import Task, estimate, merge

torch.manual_seed(0)
words = ["[PAD]", "[UNK]", "good", "bad", "fine", "poor", "film", "plot", "very", "not"]
folder = Path(tempfile.mkdtemp())


def save(name, start=None):  # stands for fine-tuning
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes))
    if start is not None:
        model.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in start.state_dict().items()})
    model.save_pretrained(folder / name)
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder / name)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([["good film", 1], ["bad plot", 0], ["very fine plot", 1], ["not good", 0]])
    return model


base = save("base")
for name in ("amazon", "nyt"):
    save(name, base)
for name in (
    "base",
    "amazon",
    "nyt",
):  # as `gradmatch estimate NAME --data NAME.csv -o NAME/curvature.safetensors`
    estimate(folder / name, folder / f"{name}.csv").save(folder / name / "curvature.safetensors")
tasks = [
    Task(folder / name, folder / name, name=name) for name in ("amazon", "nyt")
]  # each with its own curvature
merged = merge(folder / "base", tasks, base_curvature=folder / "base", out=folder / "merged")
print(merged.report.summary())
print(BertForSequenceClassification.from_pretrained(folder / "merged").num_labels, "classes")
