"""Classifiers of texts and images: where an encoder lies, loading quietly, saving, the outputs of one task alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from experiments import assets
from experiments.keys import NAMED
from gradmatch.estimators.parts import find_part
from gradmatch.measure.data import LANGUAGE_MODELS

NOTHING = (
    "cannot load a model from {}: it is no folder with a model, and no hub that has it is within reach; {}"
)
TEXTS = "encoder=encoder stands in for it (all-MiniLM-L6-v2, which needs only PyPI)"
IMAGES = "encoder=dinov2 stands in for it (DINOv2-small, which needs only PyPI)"


def locate(encoder: str | Path) -> str:
    """Folder of an asset by its name; anything else is a folder or a hub name and stays as it is."""
    return str(assets.folder(str(encoder))) if encoder in assets.ASSETS else str(encoder)


def load_classifier(source: str | Path, classes: Sequence[str] = ()) -> nn.Module:
    """A classifier of texts, or of images where its configuration says so; `ready`. With `classes`, it has a head for them.

    `package.module:function`, and a folder that such a function's module was saved in, is a module of one's own: the function is
    given the number of classes.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )
    from transformers.utils import logging

    if is_function(str(source)):
        return ready(own_module(str(source), list(classes)))
    written = Path(source) / "config.json"
    known = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    if is_function(str((known.get("architectures") or [""])[0])):
        model = own_module(known["architectures"][0], list(known["id2label"].values()))
        model.load_state_dict(load_file(Path(source) / "model.safetensors"))
        return ready(model)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # the new head is reported as missing, which is what we want
    logging.disable_progress_bar()
    try:
        kinds = AutoConfig.from_pretrained(source).architectures or ()
        if not classes and any(kind.endswith(LANGUAGE_MODELS) for kind in kinds):
            return ready(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
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


def is_function(name: str) -> bool:
    """Whether it names a function, as `package.module:function`."""
    return NAMED.fullmatch(name) is not None


def own_module(function: str, classes: Sequence[str]) -> nn.Module:
    """The module that `package.module:function` makes for so many classes; its `config` says how it is loaded again.

    Its forward takes what the tokenizer gives (input_ids, attention_mask) and `labels`, and returns what has `.logits`
    (rows, classes), and `.loss` where there are labels, as transformers' classifiers do.

    Raises:
        TypeError: it makes something else.
    """
    from transformers import PretrainedConfig

    model = find_part("encoder", "gradmatch.modules", function, {})(len(classes))
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} made a {type(model).__name__}, not a torch.nn.Module")
    own: Any = model
    own.config = PretrainedConfig(architectures=[function], id2label=dict(enumerate(classes)))
    return model


def check_head(source: str, classes: Sequence[str]) -> bool:
    """Whether a model has a head for these classes already: one that was fine-tuned, or a base that is taken as it is.

    Raises:
        ValueError: a head of other classes, or of the same in another order.
        FileNotFoundError: no model there.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(NOTHING.format(source, TEXTS)) from error
    if not any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ()):
        return False
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    if len(names) == len(classes) and (unnamed or [n.lower() for n in names] == [c.lower() for c in classes]):
        return True
    if sorted(n.lower() for n in names) == sorted(c.lower() for c in classes):
        raise ValueError(
            f"the classes of {source} are {', '.join(names)} in this order, those of the data {', '.join(classes)}: say "
            f"data.labels=[{', '.join(names)}]"
        )
    raise ValueError(
        f"{source} has a head for {len(names)} classes ({', '.join(names)}), but the data have {', '.join(classes)}: call their labels "
        "alike by `labels` of each corpus"
    )


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
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token  # the mask hides it
        return tokenizer
    except (OSError, ValueError) as error:
        raise FileNotFoundError(NOTHING.format(source, TEXTS)) from error


def save(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """A folder that `from_pretrained` loads. One of images holds the names of the module itself, which its curvature has too."""
    if tokenizer is not None and hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        model.config.architectures = [type(model).__name__]  # by which it is loaded as one of images
    model.config.save_pretrained(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
