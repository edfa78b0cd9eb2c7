"""Stage: fine-tune a classifier of texts or of images with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from experiments.files import write_json
from experiments.models import check_head, is_function, load_classifier, load_tokenizer, locate, save
from experiments.precision import used_precision, uses_bfloat16
from experiments.rows import Images, Language, Views, card_of, load_split, sets_of
from experiments.vision.heads import CommonHeadLoss, fit_head, new_classifier


def finetune(
    out: Path,
    *,
    data: Views,
    domains: Sequence[str],
    start: Path | str,
    precision: str,
    seed: int,
    tokenizer: str = "",
    pixels: int = 0,
    probe: int = 0,
    lora: Mapping[str, Any] | None = None,
    **training: Any,
) -> None:
    """Fine-tune `start` on the training rows of `domains`, all taken together. training: see `config.Training`.

    start: the folder of another run, or an encoder's name: then there is a new head, for texts of their classes; for images
    (of `pixels` a side) it has the classes of all sets, and is fitted to `probe` images of each set, before training those of
    `domains` alone and after it all. The head of images is not trained: fine-tuning moves the trunk. Writes `out/model`,
    `out/optimizer.pt` (AdamW's moments, as Trainer saves them; not those of adapters) and `out/training.json` (losses, precision).
    """
    set_seed(seed)
    rows = [load_split(data, domain, "train") for domain in domains]
    images, new = isinstance(rows[0], Images), isinstance(start, str)
    model, words = started(data, domains, start, tokenizer, pixels)
    if images and new:
        fit_head(model, data, domains, probe, seed)
    language = isinstance(rows[0], Language)
    more = {"images": images, "remove_unused_columns": not language}  # its batches need the contexts
    arguments = training_arguments(out / "model", precision=precision, seed=seed, **more, **training)
    if images:
        model.get_submodule("classifier").requires_grad_(False)
        parts = {"train_dataset": ConcatDataset(rows), "compute_loss_func": CommonHeadLoss(sets_of(data))}
    else:
        parts = texts_of(rows, words)
    trained: Any = model if lora is None else with_adapters(model, lora, language=language)
    trainer = Trainer(trained, arguments, **parts)
    losses = run(trainer)
    if lora is None:
        torch.save(trainer.optimizer.state_dict(), out / "optimizer.pt")
    else:
        model = trained.merge_and_unload()
    if images and new:
        fit_head(model, data, list(sets_of(data)), probe, seed)
    save(model, out / "model", words)
    card = {"examples": sum(map(len, rows)), "precision": used_precision(precision), "losses": losses}
    write_json(out / "training.json", card)


def started(
    data: Views, domains: Sequence[str], start: Path | str, tokenizer: str, pixels: int
) -> tuple[nn.Module, Any]:
    """The model that a training starts from, and its tokenizer (of images: None)."""
    source = start if isinstance(start, str) else start / "model"
    sets = sets_of(data)
    if pixels:
        new = sum(len(own["classes"]) for own in sets.values())
        return new_classifier(str(source), pixels, new), None
    language = card_of(data).get("language", False)
    classes = sets[domains[0]]["classes"] if isinstance(start, str) and not language else ()
    model = load_classifier(locate(source), classes)
    config: Any = model.config
    if "pad" not in card_of(data):
        return model, None
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = card_of(data)["pad"]  # by which decoders find the last token
    return model, load_tokenizer(locate(tokenizer or source))


def with_adapters(model: nn.Module, lora: Mapping[str, Any], *, language: bool) -> nn.Module:
    """A model of which adapters, and the head of a classifier, alone are trained. See `config.Lora`."""
    from peft import LoraConfig, TaskType, get_peft_model

    return get_peft_model(
        cast(Any, model),
        LoraConfig(
            task_type=TaskType.CAUSAL_LM if language else TaskType.SEQ_CLS,
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            target_modules=list(lora["targets"]) or "all-linear",
        ),
    )


def take(
    out: Path,
    *,
    data: Views,
    domains: Sequence[str],
    source: str,
    seed: int,
    tokenizer: str = "",
    pixels: int = 0,
    probe: int = 0,
    start: Path | None = None,
) -> None:
    """A model as it is, in `out/model`: a base (which is given a head, where it has none), or a fine-tuned one (with `start`, its base).

    An adapter's folder is merged into the base. The head of images is fitted to the base's features as in `finetune`, and every
    fine-tuned model gets the base's.

    Raises:
        ValueError: a head of other classes, or a fine-tuned model without one.
    """
    set_seed(seed)
    place, sets = locate(source), sets_of(data)
    if pixels:
        model, words = started(data, domains, source, tokenizer, pixels)
        if start is None:
            fit_head(model, data, list(sets), probe, seed)
        else:
            base = load_classifier(start / "model").get_submodule("classifier").state_dict()
            model.get_submodule("classifier").load_state_dict(base)
    elif (Path(place) / "adapter_config.json").is_file():
        if start is None:
            raise ValueError(f"{source} is an adapter: a base is a whole model")
        from peft import PeftModel

        model, words = started(data, domains, start, tokenizer, 0)
        adapted: Any = PeftModel.from_pretrained(cast(Any, model), place)
        model = adapted.merge_and_unload()
    elif card_of(data).get("language"):
        model, words = started(data, domains, source, tokenizer, 0)
    else:
        classes = sets[domains[0]]["classes"]
        if not is_function(place) and not check_head(place, classes) and start is not None:
            raise ValueError(f"{source} has no head that classifies texts: a fine-tuned model has one")
        model, words = started(data, domains, source, tokenizer, 0)
    save(model, out / "model", words)
    write_json(out / "training.json", {"taken": source, "precision": "none", "losses": []})


def texts_of(rows: Sequence[Any], tokenizer: Any) -> dict[str, Any]:
    """What a Trainer takes of texts: their training set, and how they are padded."""
    from datasets import concatenate_datasets

    table = concatenate_datasets([own.table for own in rows])
    if isinstance(rows[0], Language):
        return {
            "train_dataset": table.remove_columns(["labels", "document"]),
            "data_collator": LanguageBatch(rows[0].pad),
        }
    return {"train_dataset": table, "data_collator": DataCollatorWithPadding(tokenizer)}


class LanguageBatch:
    """Rows of texts as a batch for a Trainer, as `Language` makes them for everything else."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The features of one batch, padded."""
        from datasets import Dataset

        columns = {
            name: [own[name] for own in features] for name in ("input_ids", "attention_mask", "context")
        }
        ((_, batch),) = Language(Dataset.from_dict(columns), self.pad).batches(len(features))
        return batch


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
