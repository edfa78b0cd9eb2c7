"""Stage: fine-tune a classifier with transformers' Trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    bfloat16 = uses_bfloat16(precision)
    arguments = TrainingArguments(
        output_dir=str(out / "model"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=bfloat16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=False,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=[QuietBar()])
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")
    torch.save(trainer.optimizer.state_dict(), out / "optimizer.pt")
    (out / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
    losses = [
        {"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log
    ]
    card = {"examples": len(rows), "precision": "bfloat16" if bfloat16 else "float32", "losses": losses}
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
