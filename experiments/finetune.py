"""Stage: fine-tune a classifier with transformers' Trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from experiments.models import load_classifier, load_split, load_tokenizer, locate


def finetune(
    out: Path,
    *,
    data: Path,
    domains: Sequence[str],
    start: Path | str,
    num_labels: int | None = None,
    precision: str,
    seed: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    warmup_steps: int,
    weight_decay: float,
) -> None:
    """Fine-tune `start` on the training examples of `domains`, all taken together.

    start: the folder of another run, or an encoder's name together with `num_labels` for a new head. Writes `out/model`,
    `out/optimizer.pt` (AdamW's moments, as Trainer saves them) and `out/training.json` (losses, precision).
    """
    set_seed(seed)
    source = start / "model" if isinstance(start, Path) else locate(start)
    model, tokenizer = load_classifier(source, num_labels), load_tokenizer(source)
    rows = concatenate_datasets([load_split(data, domain, "train") for domain in domains])
    arguments = training_arguments(
        out / "model", precision=precision, seed=seed, steps=steps, learning_rate=learning_rate, batch_size=batch_size,
        warmup_steps=warmup_steps, weight_decay=weight_decay, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=DataCollatorWithPadding(tokenizer), train_dataset=rows)
    losses = run(trainer)
    save(trainer, tokenizer, out / "model")
    torch.save(trainer.optimizer.state_dict(), out / "optimizer.pt")
    write_card(out, len(rows), precision, losses)


def training_arguments(
    folder: Path,
    *,
    precision: str,
    seed: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    warmup_steps: int,
    weight_decay: float,
    **more: Any,
) -> TrainingArguments:
    """What every fine-tuning here has in common: AdamW, warm-up, cosine decay, clipping at 1, nothing kept on the way."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=uses_bfloat16(precision),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
        **more,
    )


def run(trainer: Trainer) -> list[dict[str, float]]:
    """Train, with one quiet bar; returns the losses on the way."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(QuietBar())
    trainer.train()
    return [{"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log]


def save(trainer: Trainer, tokenizer: Any, folder: Path) -> None:
    """A model folder that `from_pretrained` loads."""
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs


def write_card(out: Path, examples: int, precision: str, losses: Sequence[Mapping[str, float]]) -> None:
    """`out/training.json`: how many examples, in which precision, and the losses on the way."""
    used = "bfloat16" if uses_bfloat16(precision) else "float32"
    card = {"examples": examples, "precision": used, "losses": list(losses)}
    (out / "training.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def uses_bfloat16(precision: str) -> bool:
    """Whether the forward runs under bfloat16 autocast (weights and AdamW stay float32); `auto`: where it is faster.

    It is on GPUs since Ampere and on processors with bfloat16 arithmetic; elsewhere it is emulated, and slow.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class QuietBar(ProgressCallback):
    """Trainer's progress bar, with the loss in it instead of on lines of their own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest loss beside the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")
