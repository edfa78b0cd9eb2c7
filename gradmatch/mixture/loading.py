"""`load`: the module of a mixture's folder, with every value from its files and what several experts share held once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.building import MODEL_TYPE, make
from gradmatch.mixture.request import ROUTER
from gradmatch.models.loading import load as load_model
from gradmatch.models.opening import open_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from gradmatch.models.checkpoint import Checkpoint


def load(folder: str | os.PathLike[str]) -> nn.Module:
    """The module of a mixture or of a stack, in float32 and for inference; no code of the folder is run.

    Args:
        folder: what `mix` or `stack` wrote.

    Returns:
        A model with `forward(**batch).logits`, and `generate` where it is one of text. At the ffn and block levels it is the base's
        own class with experts in its layers. The routers' parameters are named router or gate.

    Raises:
        FileNotFoundError: no such folder.
        GradmatchError: a tensor that is missing, left over or of another shape, or a router that was made for other experts.

    >>> model = load("mixture")                                              # doctest: +SKIP
    >>> model.generate(**tokenizer("2 + 2 =", return_tensors="pt"))           # doctest: +SKIP
    """
    if not Path(folder).expanduser().is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    checkpoint = open_checkpoint(folder)
    config = dict(checkpoint.config or {})
    check_router(checkpoint)
    if config.get("model_type") != MODEL_TYPE:
        return load_model(checkpoint).eval()
    module = make(config["mixture"])
    fill(module, checkpoint, config["mixture"]["shared"])
    return module.eval()


def check_router(checkpoint: Checkpoint) -> None:
    """Refuse a router that was made for other experts than those beside it.

    Raises:
        GradmatchError: the two say different experts.
    """
    folder = checkpoint.folder
    if folder is None or not (folder / ROUTER).is_file():
        return
    from gradmatch.estimators.files import read_json
    from gradmatch.estimators.tensorfile import TensorFile
    from gradmatch.output.card import CARD

    told = TensorFile(folder / ROUTER).metadata.get("experts")
    card: Any = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    wanted = (card.get("mixture") or {}).get("digest")
    if told and wanted and told != wanted:
        raise GradmatchError(
            f"{folder / ROUTER} was made for other experts than {', '.join(card['mixture']['experts'])}; copy the router of this mixture, or "
            "mix and train again",
            "other_weights",
            folder / ROUTER,
        )


def fill(module: nn.Module, checkpoint: Checkpoint, shared: dict[str, str]) -> None:
    """Put a mixture's tensors into its module, by their names; those that experts share become one parameter.

    Raises:
        GradmatchError: a tensor that is missing, left over, or of another shape.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = module.state_dict()
    ties: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        ties.setdefault(id(parameter), []).append(name)
    for name in checkpoint.store:
        if name not in state:
            raise GradmatchError(
                f"{checkpoint.where} holds {name!r}, which its config has no place for; mix again",
                "bad_model",
                name,
            )
    with torch.no_grad():
        for name, tensor in state.items():
            others = ties.get(id(parameters[name]), [name]) if name in parameters else [name]
            key = next(
                (k for other in (name, *others) for k in (shared.get(other, other),) if k in checkpoint), None
            )
            if key is None:
                raise GradmatchError(
                    f"{checkpoint.where} lacks {name!r} {list(tensor.shape)}; it would stay as it is drawn at random: mix again",
                    "bad_model",
                    name,
                )
            value = checkpoint[key]
            if value.shape != tensor.shape:
                raise GradmatchError(
                    f"{checkpoint.where}: {key!r} has shape {list(value.shape)}, its config says {list(tensor.shape)}; mix again",
                    "shape_mismatch",
                    key,
                )
            if name not in shared:
                tensor.copy_(value)
    for name, key in shared.items():
        if key in parameters and name in parameters:
            for tied in ties[id(parameters[name])]:  # a head goes with its embeddings
                parent, _, leaf = tied.rpartition(".")
                setattr(module.get_submodule(parent), leaf, module.get_parameter(key))
        else:
            state[name].copy_(checkpoint[key])
