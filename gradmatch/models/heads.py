"""Heads that were kept beside a merged trunk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.estimators.tensorfile import TensorFile

if TYPE_CHECKING:
    from torch import Tensor, nn


def load_head(model: nn.Module, folder: str | os.PathLike[str], task: str) -> dict[str, Tensor]:
    """Put one task's head onto a model whose trunk was merged with heads="keep-per-task".

    Args:
        model: of that task's architecture, with the merged trunk.
        folder: the merge's output.
        task: name of the task.

    Returns:
        The head's tensors, which are now in the model too.

    Raises:
        FileNotFoundError: the folder keeps no head of this task; those it keeps are named.
        ValueError: the model has no such tensor, or one of another shape.
    """
    path = Path(folder) / "heads" / f"{task}.safetensors"
    if not path.is_file():
        kept = sorted(file.stem for file in path.parent.glob("*.safetensors"))
        raise FileNotFoundError(f"{folder} keeps no head of {task!r}{nearest(task, kept)}; it keeps {kept}")
    file = TensorFile(path)
    head = {name: file.read(name) for name in file}
    own = model.state_dict()
    for name, value in head.items():
        if name not in own or own[name].shape != value.shape:
            found = list(own[name].shape) if name in own else "absent"
            raise GradmatchError(
                f"head tensor {name!r} of {task} has shape {list(value.shape)}, in the model it is {found}",
                "shape_mismatch",
                name,
            )
    model.load_state_dict(head, strict=False)
    return head
