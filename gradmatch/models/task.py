"""A task: one fine-tuned model, what is known about its loss, and how much it counts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

from gradmatch.common.kinds import leaves, plain
from gradmatch.common.settings import Setting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.estimators.curvature import Curvature

Model = Union[str, "os.PathLike[str]", Mapping[str, "Tensor"], "nn.Module"]


@dataclass(frozen=True)
class Task:
    """One fine-tuned model to merge.

    Attributes:
        model: path, hub id, state dict or module; a PEFT adapter folder is expanded on the merge's base.
        curvature: of its summed loss at its weights, or the path of the curvature file. It also carries the measured gradient.
        weight: alpha_t; a number, or one per layer or name pattern (see `gradmatch.common.settings`).
        name: how reports call it, and what its random draws depend on; empty: the folder's name or its position.
        options: of the transforms, for this task alone: density, epsilon or gamma.
    """

    model: Model
    curvature: Curvature | str | os.PathLike[str] | None = None
    weight: Setting = 1.0
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is no model before anything is opened.

        Raises:
            TypeError: a model that is nothing a checkpoint can be opened from.
        """
        if not is_model(self.model):
            raise TypeError(
                f"Task({self.name or '...'}): a model is a path, a hub id, a state dict or a module, not {type(self.model).__name__}"
            )
        object.__setattr__(self, "weight", plain(self.weight))
        list(leaves(self.weight))  # filters that are none
        object.__setattr__(self, "options", plain(self.options))


def is_model(model: Any) -> bool:
    """Whether a checkpoint can be opened from this: a path, a mapping of tensors or a module."""
    return isinstance(model, (str, os.PathLike, Mapping)) or hasattr(model, "state_dict")
