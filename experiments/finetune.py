"""Stage: fine-tune a classifier of texts or of images with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from experiments.files import write_json
from experiments.models import load_classifier, load_tokenizer, locate, save
from experiments.precision import used_precision, uses_bfloat16
from experiments.rows import Images, Views, load_split, sets_of
from experiments.vision.heads import CommonHeadLoss, fit_head, new_classifier


def finetune(
    out: Path,
    *,
    data: Views,
    domains: Sequence[str],
    start: Path | str,
    precision: str,
    seed: int,
    pixels: int = 0,
    probe: int = 0,
    **training: Any,
) -> None:
    """Fine-tune `start` on the training rows of `domains`, all taken together. training: see `config.Training`.

    start: the folder of another run, or an encoder's name: then there is a new head, for texts of their classes; for images
    (of `pixels` a side) it has the classes of all sets, and is fitted to `probe` images of each set, before training those of
    `domains` alone and after it all. The head of images is not trained: fine-tuning moves the trunk. Writes `out/model`,
    `out/optimizer.pt` (AdamW's moments, as Trainer saves them) and `out/training.json` (losses, precision).
    """
    set_seed(seed)
    rows = [load_split(data, domain, "train") for domain in domains]
    images, new = isinstance(rows[0], Images), isinstance(start, str)
    source = start if isinstance(start, str) else start / "model"
    if images and new:
        model = new_classifier(
            str(source), pixels, sum(len(own["classes"]) for own in sets_of(data).values())
        )
        fit_head(model, data, domains, probe, seed)
    else:
        classes = sets_of(data)[domains[0]]["classes"] if new else ()
        model = load_classifier(locate(source), classes)
    arguments = training_arguments(out / "model", images=images, precision=precision, seed=seed, **training)
    if images:
        tokenizer = None
        model.get_submodule("classifier").requires_grad_(False)
        parts = {"train_dataset": ConcatDataset(rows), "compute_loss_func": CommonHeadLoss(sets_of(data))}
    else:
        tokenizer = load_tokenizer(locate(source))
        parts = texts_of(rows, tokenizer)
    trainer = Trainer(model, arguments, **parts)
    losses = run(trainer)
    torch.save(trainer.optimizer.state_dict(), out / "optimizer.pt")
    if images and new:
        fit_head(model, data, list(sets_of(data)), probe, seed)
    save(model, out / "model", tokenizer)
    card = {"examples": sum(map(len, rows)), "precision": used_precision(precision), "losses": losses}
    write_json(out / "training.json", card)


def texts_of(rows: Sequence[Any], tokenizer: Any) -> dict[str, Any]:
    """What a Trainer takes of texts: their training set, and how they are padded."""
    from datasets import concatenate_datasets

    tables = [own.table for own in rows]
    return {
        "train_dataset": concatenate_datasets(tables),
        "data_collator": DataCollatorWithPadding(tokenizer),
    }


def training_arguments(
    folder: Path, *, precision: str, seed: int, steps: int, batch_size: int, images: bool = False, **more: Any
) -> TrainingArguments:
    """What every fine-tuning here has in common: AdamW, warm-up, cosine decay, clipping at 1, nothing kept on the way."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=uses_bfloat16(precision),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        train_sampling_strategy="random" if images else "group_by_length",
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


class QuietBar(ProgressCallback):
    """Trainer's progress bar, with the loss in it instead of on lines of their own."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the latest loss beside the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")
