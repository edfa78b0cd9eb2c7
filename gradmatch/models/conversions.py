"""transformers' own conversion of tensors as it loads files, known as a rearrangement that is carried out lazily and undone.

It is run on the numbers of pieces instead of their values. Nothing here knows an architecture.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.gathered import Part
from gradmatch.models.stores import Spec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Stored tensors that become tensors of the module together, by a conversion that rearranges their elements.

    Attributes:
        sources, targets: name -> shape and dtype, in order.
        convert: given tensors for the sources, those for the targets.
        where: whose tensors, for messages.
    """

    sources: Mapping[str, Spec]
    targets: Mapping[str, Spec]
    convert: Callable[[Sequence[Tensor]], Mapping[str, Tensor]]
    where: str

    def parts(self, back: bool = False) -> dict[str, Part]:
        """The targets as pieces of the sources; with `back`, the sources as pieces of the targets."""
        given, made = (self.targets, self.sources) if back else (self.sources, self.targets)
        parts, first = {}, 0
        for name, spec in made.items():
            parts[name] = Part(tuple(given), spec, functools.partial(_cut, self, back, first, spec.numel))
            first += spec.numel
        return parts


def _cut(group: Group, back: bool, first: int, numel: int) -> tuple[int, Tensor]:
    """The pieces of one tensor of a group."""
    width, forth, inverse = _pieces(group)
    return width, (inverse if back else forth)[first // width : (first + numel) // width]


@functools.lru_cache(maxsize=32)
def _pieces(group: Group) -> tuple[int, Tensor, Tensor]:
    """The number of elements of a piece; the source's piece for each of the targets'; the target's piece for each of the sources'.

    Rows of the last dimension are the pieces where the conversion leaves them whole, else single elements.
    """
    import torch

    rows = {spec.shape[-1:] for spec in (*group.sources.values(), *group.targets.values())}
    widths = {math.prod(row) for row in rows}
    for width in [*(widths if len(widths) == 1 else ()), 1]:
        forth = _numbered(group, width)
        if forth is not None:
            inverse = torch.empty_like(forth)
            inverse[forth] = torch.arange(len(forth))
            return width, forth, inverse
    raise GradmatchError(
        f"{group.where}: transformers computes {next(iter(group.targets))!r} from {', '.join(group.sources)} and does not only "
        "rearrange them; load the model with transformers, save it with save_pretrained, and merge that",
        "bad_model",
    )


def _numbered(group: Group, width: int) -> Tensor | None:
    """The conversion of piece numbers; None where pieces of this width do not stay whole."""
    import torch

    def shape(spec: Spec) -> tuple[int, ...]:
        return spec.shape if width == 1 else (*spec.shape[:-1], 1)

    numbers, first = [], 0
    for spec in group.sources.values():
        count = spec.numel // width
        numbers.append(torch.arange(first, first + count).reshape(shape(spec)))
        first += count
    try:
        made = group.convert(numbers)
    except (RuntimeError, ValueError, IndexError):  # such as a split of the dimension that was shrunk
        return None
    if any(tuple(made[name].shape) != shape(spec) for name, spec in group.targets.items()):
        return None
    order = torch.cat([made[name].reshape(-1) for name in group.targets])
    return order if torch.equal(order.sort().values, torch.arange(first)) else None


class Conversions:
    """transformers' conversions of one model, in the order in which it applies them; some remember what they have seen."""

    def __init__(self, module: Any, transforms: Sequence[Any]) -> None:
        from transformers import core_model_loading as loading

        self._loading, self._module = loading, module
        self._renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
        self._of_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Names in the order in which transformers goes through them."""
        return sorted(names, key=self._loading.dot_natural_key)

    def renamed(self, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str | None]:
        """The name in the module, and the pattern of the converter that takes the tensor, or None."""
        prefix = self._module.base_model_prefix
        rename = self._loading.rename_source_key
        found: tuple[str, str | None] = rename(name, self._renamings, self._converters, prefix, tensors)
        if found[0] not in tensors and name in tensors:  # it has the module's name already
            found = rename(name, [], [], prefix, tensors)
        return found

    def convert(self, name: str, patterns: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """What one converter makes of the tensors that it collected, each under the pattern that matched it."""
        converter = copy.deepcopy(self._of_pattern[patterns[0]])
        for pattern, tensor in zip(patterns, tensors, strict=True):
            converter.add_tensor(name, name, pattern, tensor)
        made = converter.convert(name, model=self._module, config=self._module.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def conversions_of(module: Any) -> Conversions | None:
    """Those of a model of transformers; None for any other module.

    Raises:
        ValueError: a version of transformers that does not tell them.
    """
    if not hasattr(module, "base_model_prefix"):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError as error:
        import transformers

        raise GradmatchError(
            f"the names of two models differ, and transformers {transformers.__version__} does not tell how it loads them; "
            "install transformers 5 or newer",
            "bad_model",
        ) from error
    return Conversions(module, get_model_conversion_mapping(module))
