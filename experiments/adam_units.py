"""Curvature from Adam's moments of real Trainer runs, against the Fisher of the very same steps.

    python -m experiments.adam_units            (tiny random models on the CPU, two to four minutes; expected: within 25 %)

For every variant of the training arguments a tiny model is trained, all its batches and all its weights are kept, and the
reference is computed from them: the mean over steps of (sum over the step's examples of d log p)^2 / examples. `told` is
the trace of `from_adam` over the reference's where the run's files tell the scale, else why they do not; `calibrated` is the
trace after `calibrate` over that of the empirical Fisher of the whole training set at the last weights.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from gradmatch.estimators import estimate, from_adam

STEPS, EXAMPLES = 30, 64
Batch = dict[str, Tensor]


def encoder(**options: Any) -> tf.PreTrainedModel:
    """A tiny BERT classifier without dropout."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes, **options))


def decoder(kind: str) -> tf.PreTrainedModel:
    """A tiny causal language model without dropout."""
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 60}
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **quiet, bos_token_id=1, eos_token_id=2))
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60,
        "num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))


def make(kind: str) -> tf.PreTrainedModel:
    """A model by its short name."""
    encoders = {
        "classes": {"num_labels": 3},
        "regression": {"num_labels": 1, "problem_type": "regression"},
        "yes/no": {"num_labels": 4, "problem_type": "multi_label_classification"},
    }
    return encoder(**encoders[kind]) if kind in encoders else decoder(kind)


def rows(kind: str, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Short random texts of different lengths; the labels follow from them, so that there is something to learn."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(4, 60, (int(torch.randint(6, 14, (1,), generator=draw)),), generator=draw)
        labels: Any = {"classes": int(ids[0]) % 3, "regression": float(ids[0]) / 30 - 1}.get(kind, ids)
        if kind == "yes/no":
            labels = (ids[:4] % 2).float()
        found.append({"input_ids": ids, "labels": labels})
    return found


@dataclass
class Collator:
    """Pads, and keeps every batch that it made."""

    kept: list[Batch] = field(default_factory=list)

    def __call__(self, given: list[dict[str, Any]]) -> Batch:
        """A padded batch."""
        ids = [row["input_ids"] for row in given]
        pad = nn.utils.rnn.pad_sequence
        labels = [row["labels"] for row in given]
        batch = {
            "input_ids": pad(ids, batch_first=True),
            "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
        }
        if not isinstance(labels[0], Tensor):
            batch["labels"] = torch.tensor(labels)
        elif labels[0].is_floating_point():
            batch["labels"] = torch.stack(labels)
        else:
            batch["labels"] = pad(labels, batch_first=True, padding_value=-100)
        self.kept.append(batch)
        return batch


@dataclass
class Watch(tf.TrainerCallback):
    """Keeps the weights at which every step's gradient was taken."""

    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Copy them."""
        self.kept.append(copy.deepcopy(given["model"].state_dict()))


@dataclass
class Trained:
    """A run: its checkpoint, the model at its end, and the squared norm of every step's summed gradient per example."""

    folder: Path
    model: tf.PreTrainedModel
    squares: list[float]

    def reference(self, beta2: float = 0.999) -> float:
        """Trace of the batch form of the Fisher, by Adam's weights."""
        last = len(self.squares) - 1
        weights = [beta2 ** (last - step) for step in range(len(self.squares))]
        return sum(w * s for w, s in zip(weights, self.squares, strict=True)) / sum(weights)


def train(kind: str, folder: Path, steps: int = STEPS, count: int = EXAMPLES, **arguments: Any) -> Trained:
    """Train a tiny model with the real Trainer and compute the reference from what was kept."""
    model, collator, watch = make(kind), Collator(), Watch()
    if arguments.pop("half", False):
        model = model.to(torch.bfloat16)
    options = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": steps,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, **arguments,
    }  # fmt: skip
    given = tf.TrainingArguments(str(folder), **options)
    trainer = tf.Trainer(
        model, given, train_dataset=rows(kind, count), data_collator=collator, callbacks=[watch]
    )
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    passes = given.gradient_accumulation_steps
    groups = [collator.kept[n : n + passes] for n in range(0, steps * passes, passes)]
    squares = [_square(model, weights, group) for weights, group in zip(watch.kept, groups, strict=True)]
    return Trained(folder / f"checkpoint-{steps}", model, squares)


def _square(model: tf.PreTrainedModel, weights: dict[str, Tensor], batches: list[Batch]) -> float:
    """|sum_n d(-log p)|^2 / examples of one step, by plain autograd at the weights of that step."""
    at = copy.deepcopy(model).float()
    at.load_state_dict(weights)
    loss = sum(summed_loss(at, batch) for batch in batches)
    gradients = torch.autograd.grad(loss, list(at.parameters()), allow_unused=True)
    examples = sum(len(batch["input_ids"]) for batch in batches)
    return sum(float(g.double().square().sum()) for g in gradients if g is not None) / examples


def summed_loss(model: tf.PreTrainedModel, batch: Batch) -> Tensor:
    """-log p, summed over examples and tokens: the loss whose curvature is meant."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
    labels = batch["labels"]
    if labels.is_floating_point():
        kind = model.config.problem_type
        if kind == "regression":
            return (logits.view(-1) - labels.view(-1)).square().sum() / 2
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def batches(kind: str, count: int, size: int = 4) -> Iterator[Batch]:
    """The first rows of the training set."""
    given = rows(kind)
    for first in range(0, count, size):
        yield Collator()(given[first : first + size])


# what is varied -> (model, training arguments)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("classes", {}),
    "not clipped": ("classes", {"max_grad_norm": 0.0}),
    "clipped hard, logged": ("classes", {"max_grad_norm": 0.05, "logging_steps": 1}),
    "clipped hard, every third logged": ("classes", {"max_grad_norm": 0.05, "logging_steps": 3}),
    "clipped hard, not logged": ("classes", {"max_grad_norm": 0.05}),
    "four passes": ("classes", {"max_grad_norm": 0.0, "gradient_accumulation_steps": 4}),
    "weight decay, bf16": ("classes", {"max_grad_norm": 0.0, "weight_decay": 0.1, "bf16": True}),
    "bf16 moments": ("classes", {"max_grad_norm": 0.0, "half": True}),
    "regression": ("regression", {"max_grad_norm": 0.0}),
    "yes/no": ("yes/no", {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}),
    "llama": ("llama", {}),
    "llama, not clipped": ("llama", {"max_grad_norm": 0.0}),
    "gpt2, four passes, logged": ("gpt2", {"gradient_accumulation_steps": 4, "logging_steps": 1}),
    "adafactor": ("classes", {"optim": "adafactor"}),
}


def told(run: Trained) -> str:
    """The ratio of traces, or the refusal."""
    try:
        found = from_adam(run.folder, run.model, num_examples=EXAMPLES)
    except ValueError as error:
        return f"refused: {str(error).removeprefix('the scale of these moments is not known: ')[:96]}"
    return f"{found.trace() / run.reference():.2f}"


def main() -> None:
    """Print the table."""
    tf.logging.set_verbosity_error()
    print(f"{'variant':34} {'calibrated':>10}  told by the run's files")
    for name, (kind, arguments) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = train(kind, Path(folder), **arguments)
            calibrated = "-"
            if arguments.get("optim") is None:
                found = from_adam(run.folder, run.model, num_examples=EXAMPLES, calibrate=batches(kind, 16))
                whole = estimate(
                    run.model, batches(kind, EXAMPLES), method="empirical_fisher", progress=False
                )
                calibrated = f"{found.trace() / whole.trace():.2f}"
            print(f"{name:34} {calibrated:>10}  {told(run)}", flush=True)


if __name__ == "__main__":
    main()
