"""One batch, whatever its form: what goes into the model, the labels, the padding mask, and how many examples it has."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradmatch.estimators.errors import GradmatchError

LABEL_KEYS = ("labels", "label", "label_ids", "targets", "target", "y")
log = logging.getLogger(__name__)


@dataclass
class Batch:
    """A batch on the model's device. An *example* is a row of it (one sequence for language models).

    Attributes:
        args, kwargs: what the model is called with; labels are taken out wherever the model does not require them.
        labels: the true labels, a tensor or whatever one's own likelihood takes; or None.
        mask: (B, T) bool, true at real tokens; or None.
        ids: (B, T) token ids, or None.
        size: number of examples B.
        index: which batch of the run it is, for error messages.
        first, stride: place of its first example in the whole run, and from one row to the next; draws of labels
            depend on them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    mask: Tensor | None
    ids: Tensor | None
    size: int
    index: int = 0
    first: int = 0
    stride: int = 1

    def rows(self, first: int, last: int) -> Batch:
        """The batch made of rows first .. last-1; tensors whose leading dimension is not B are shared by all rows."""

        def cut(value: Any) -> Any:
            is_batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.size
            return value[first:last] if is_batched else value

        args, kwargs = pytree.tree_map(cut, (self.args, self.kwargs))
        return replace(
            self,
            args=args,
            kwargs=kwargs,
            labels=pytree.tree_map(cut, self.labels),
            mask=cut(self.mask),
            ids=cut(self.ids),
            size=last - first,
            first=self.first + self.stride * first,
        )

    def values_per_row(self) -> int:
        """Numbers that a row of its first input holds: tokens, or pixels."""
        first = next(
            value
            for value in pytree.tree_leaves((_preferred(self.kwargs), self.args, self.kwargs))
            if isinstance(value, Tensor) and value.dim() > 0
        )
        return max(1, first.numel() // self.size)

    def copied(self) -> Batch:
        """With inputs in memory of their own."""
        args, kwargs = pytree.tree_map(
            lambda value: value.clone() if isinstance(value, Tensor) else value, (self.args, self.kwargs)
        )
        return replace(self, args=args, kwargs=kwargs)


class BatchReader:
    """Turns what an iterator yields into `Batch`es for one model.

    Accepted: a mapping of tensors or numpy arrays (HF style), `(inputs, targets)`, `(input, input, ..., targets)`, `(inputs,)`, or a
    bare tensor. `inputs` may itself be a mapping or a tuple.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.model = model
        self.parameters, self.takes_any = _forward_parameters(model)
        # Models that number places from 0 on whatever the mask says; others (RoBERTa) number tokens that are no padding.
        own = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
        self.counts_places = "position_ids" in self.parameters and not own
        self._warned: set[str] = set()

    def __call__(self, raw: Any, index: int = 0, first: int = 0) -> Batch:
        """Read one batch."""
        raw = pytree.tree_map(self._move, dict(raw) if isinstance(raw, Mapping) else raw)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        labels: Any = None
        if isinstance(raw, Mapping):
            kwargs, labels, args = self._split_mapping(raw)
        elif isinstance(raw, Tensor):
            args = (raw,)
        elif isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw) > 0:
            *inputs, labels = raw if len(raw) > 1 else (raw[0], None)
            if len(inputs) == 1 and isinstance(inputs[0], Mapping):
                kwargs, inner, args = self._split_mapping(inputs[0])
                labels = inner if labels is None else labels
            elif len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
                args = tuple(inputs[0])
            else:
                args = tuple(inputs)
        else:
            raise TypeError(
                f"batch {index} is a {type(raw).__name__}; give a dict of tensors, an (inputs, targets) tuple or a tensor"
            )
        if isinstance(labels, (int, float, Sequence)) and not isinstance(labels, str):
            try:
                labels = torch.as_tensor(labels, device=self.device)
            except (
                TypeError,
                ValueError,
                RuntimeError,
            ) as error:  # one's own likelihood may want them as they are
                log.debug("labels of batch %s stay as they are: %s", index, error)
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if (
            ids is None
            and args
            and isinstance(args[0], Tensor)
            and args[0].dim() == 2
            and not args[0].is_floating_point()
        ):
            ids = args[0]
        size = _batch_size(args, kwargs, index)
        if isinstance(mask, Tensor):
            mask = mask.bool() if mask.dim() == 2 else None
        if isinstance(mask, Tensor) and self.counts_places and "position_ids" not in kwargs:
            moved = ~mask[:, 0] & mask.any(1)  # by padding on the left
            kwargs |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if bool(moved.any()) else {}
        return Batch(args, kwargs, labels, mask, ids, size, index, first)

    def _split_mapping(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], Any, tuple[Any, ...]]:
        """Keyword inputs, labels and positional inputs of a mapping.

        Keys that the model's forward does not know are left out, with one warning; where it knows none of them it gets
        the only input, or the mapping, as its positional argument.
        """
        kwargs = dict(raw)
        labels = None
        for key in LABEL_KEYS:
            if key == "y" and key in self.parameters:
                continue
            if key in kwargs and not self._requires(key):
                labels = kwargs.pop(key) if labels is None else labels
            elif key in kwargs:
                labels = kwargs[key]
        if not self.takes_any and not set(kwargs) & set(self.parameters):
            return {}, labels, tuple(kwargs.values()) if len(kwargs) == 1 else (kwargs,)
        if not self.takes_any:
            for key in [key for key in kwargs if key not in self.parameters]:
                del kwargs[key]
                if key not in self._warned:
                    self._warned.add(key)
                    log.warning("%s does not take %r: left out", type(self.model).__name__, key)
        if labels is not None and "decoder_input_ids" in self.parameters:
            shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if (
                "decoder_input_ids" not in kwargs
                and "decoder_inputs_embeds" not in kwargs
                and shift is not None
            ):
                kwargs["decoder_input_ids"] = shift(labels=labels)
        return kwargs, labels, ()

    def _requires(self, key: str) -> bool:
        parameter = self.parameters.get(key)
        return parameter is not None and parameter.default is inspect.Parameter.empty

    def _move(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(value)
        return value.detach().to(self.device) if isinstance(value, Tensor) else value


def _forward_parameters(model: nn.Module) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of model.forward (of the innermost model for wrappers), and whether it takes any keyword."""
    parameters = dict(inspect.signature(model.forward).parameters)
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    inner = getattr(model, "get_base_model", None)  # PEFT wrappers take **kwargs for the model inside
    if takes_any and callable(inner):
        below, _ = _forward_parameters(inner())
        parameters = {**below, **parameters}
    return parameters, takes_any


def _preferred(kwargs: dict[str, Any]) -> list[Any]:
    """What tells the size of a batch before all else."""
    return [kwargs[key] for key in ("input_ids", "inputs_embeds", "pixel_values") if key in kwargs]


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> int:
    """Rows of the batch: the leading dimension of its first input (input_ids and pixel_values before others)."""
    for value in pytree.tree_leaves((_preferred(kwargs), args, kwargs)):
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.shape[0] == 0:
                raise GradmatchError(
                    f"batch {index} is empty: its first input has shape {list(value.shape)}", "bad_batch"
                )
            return int(value.shape[0])
    raise GradmatchError(
        f"batch {index} holds no input tensor; keys: {sorted(kwargs) or 'none'}", "bad_batch"
    )
