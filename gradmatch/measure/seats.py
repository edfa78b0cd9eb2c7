"""Weights in the place of a module's own: every parameter from the weights that are given, ties kept, names as the module has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.wrapped import bare_names
from gradmatch.models.loading import check_complete
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.structure import Structure
from gradmatch.models.views import by_module

if TYPE_CHECKING:
    from torch import Tensor, nn

Weights = Mapping[str, "Tensor"]
Tensors = dict[str, "Tensor"]


class Seats:
    """The parameters and persistent buffers of a module, as places to be taken.

    Args:
        module: not wrapped; its own weights are never changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._structure = Structure(module)
        self._own = {**dict(module.named_parameters(remove_duplicate=False)), **module.state_dict()}
        self._names = bare_names(self._own)
        shared: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        self._twins = {name: names for names in shared.values() if len(names) > 1 for name in names}

    def placed(self, weights: Weights) -> Tensors:
        """Every parameter and persistent buffer of the module at these weights, by its name there, read once.

        A tensor that the module ties and the weights do too is one. Empty weights are the module's own.

        Raises:
            ValueError: weights that do not give all of them.
        """
        if not weights:
            return dict(self._own)
        names = self._names
        view: Any = weights
        if not all(name in weights for name in names.values()):
            view = by_module(open_checkpoint(weights), self._structure)
            check_complete(self._structure, view)
        placed: Tensors = {}
        for name, tensor in self._own.items():
            value = view[names[name]].detach()
            if value.shape != tensor.shape:
                raise GradmatchError(
                    f"{names[name]!r} has shape {list(value.shape)}, in {type(self.module).__name__} it is {list(tensor.shape)}",
                    "bad_data",
                )
            value = value.to(tensor)
            twins = (placed[twin] for twin in self._twins.get(name, ()) if twin in placed)
            placed[name] = next((twin for twin in twins if torch.equal(twin, value)), value)
        return placed

    def leaves(self, placed: Tensors) -> Tensors:
        """The module's parameters (a tied one once) as they are placed.

        Raises:
            ValueError: two tensors for one that the module ties.
        """
        leaves = {name: placed[name].detach() for name, _ in self.module.named_parameters()}
        for name, twins in self._twins.items():
            if any(placed[twin] is not placed[name] for twin in twins if twin in placed):
                raise GradmatchError(
                    f"{type(self.module).__name__} ties {name!r} to {', '.join(t for t in twins if t != name)}, and these weights give "
                    "two different tensors: derivatives need a module that does not tie them (tie_word_embeddings=False)",
                    "bad_data",
                    name,
                )
        return leaves

    def spread(self, placed: Tensors, leaves: Tensors) -> Tensors:
        """The placed tensors with leaves in their places, under every name of a tied one."""
        spread = {twin: leaf for name, leaf in leaves.items() for twin in self._twins.get(name, ())}
        return {**placed, **leaves, **spread}

    def moves(self, direction: Weights) -> Tensors:
        """A direction by the names of the module's parameters.

        Raises:
            ValueError: it moves a tensor that the module does not have.
        """
        known = {*self._names.values(), *self._structure.buffers}
        view: Any = direction
        if any(name not in known for name in direction):
            view = by_module(open_checkpoint(direction), self._structure)
            stray = next((name for name in view if name not in known), None)
            if stray is not None:
                raise GradmatchError(
                    f"a direction moves {stray!r}, which {type(self.module).__name__} does not have; the two are of different models",
                    "bad_data",
                )
        moves: Tensors = {}
        for name, _ in self.module.named_parameters():
            short = next(
                (self._names[n] for n in self._twins.get(name, [name]) if self._names[n] in view), None
            )
            if short is not None:
                moves[name] = view[short]
        return moves
