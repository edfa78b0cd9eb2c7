"""Classifiers of texts and images: where an encoder lies, loading quietly, saving, the outputs of one task alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from experiments import assets

NOTHING = (
    "cannot load a model from {}: it is no folder with a model, and no hub that has it is within reach; {}"
)
TEXTS = "encoder=encoder stands in for it (all-MiniLM-L6-v2, which needs only PyPI)"
IMAGES = "encoder=dinov2 stands in for it (DINOv2-small, which needs only PyPI)"


def locate(encoder: str | Path) -> str:
    """Folder of an asset by its name; anything else is a folder or a hub name and stays as it is."""
    return str(assets.folder(str(encoder))) if encoder in assets.ASSETS else str(encoder)


def load_classifier(source: str | Path, classes: Sequence[str] = ()) -> nn.Module:
    """A classifier of texts, or of images where its configuration says so; `ready`. With `classes`, it has a head for them."""
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # the new head is reported as missing, which is what we want
    logging.disable_progress_bar()
    try:
        kinds = AutoConfig.from_pretrained(source).architectures or ()
        images = any(kind.endswith("ForImageClassification") for kind in kinds)
        loader = AutoModelForImageClassification if images else AutoModelForSequenceClassification
        head: dict[str, Any] = {}
        if classes:
            numbers = {name: number for number, name in enumerate(classes)}
            head = {
                "id2label": dict(enumerate(classes)),
                "label2id": numbers,
                "ignore_mismatched_sizes": True,
            }
        return ready(loader.from_pretrained(source, dtype=torch.float32, **head))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(NOTHING.format(source, TEXTS)) from error
    finally:
        logging.set_verbosity(before)


def ready(model: nn.Module) -> nn.Module:
    """In eval mode, without dropout, on the device there is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def narrowed(model: nn.Module, classes: slice) -> nn.Module:
    """The same model, whose outputs are the logits of some classes alone; the names of its parameters stay."""

    def narrow(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.logits = output.logits[:, classes]
        return output

    if classes != slice(None):
        model.register_forward_hook(narrow)
    return model


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub name."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(NOTHING.format(source, TEXTS)) from error


def pad_id(tokenizer: Any) -> int:
    """The token that fills up batches: the tokenizer's own, else its end (the mask hides it), else 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(number) for number in known if number is not None), 0)


def save(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """A folder that `from_pretrained` loads. One of images holds the names of the module itself, which its curvature has too."""
    if tokenizer is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]  # by which it is loaded as one of images
    model.config.save_pretrained(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
