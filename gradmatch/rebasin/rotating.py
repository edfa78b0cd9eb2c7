"""The residual stream of networks with RMSNorm, turned: their function does not notice any rotation once the norms' gains are folded.

A gain is multiplied into the layers that read the norm, which leaves a norm of ones (Ashkboos et al. 2024, SliceGPT); then one
orthogonal matrix turns all that is written to the stream and all that reads it. The matrix is Procrustes' (Theus et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.views import like
from gradmatch.rebasin.aligning import check_same, verified
from gradmatch.rebasin.matching import Pairs, match, moved
from gradmatch.rebasin.pair import Two
from gradmatch.rebasin.probing import answer, calls_of, example, module_with, symmetry_of_checkpoint
from gradmatch.rebasin.symmetry import Dim, Member, Symmetry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from gradmatch.models.task import Model
    from gradmatch.rebasin.probing import Call

ROUNDS = 4  # of rotation and of orders in turn


@dataclass(frozen=True)
class Stream:
    """The residual stream of a network.

    Attributes:
        group: of the symmetry whose positions it has.
        gains: tensor that reads a norm -> the tensor with the norm's gain.
        norms: the tensors with gains.
    """

    group: str
    gains: Mapping[str, str]
    norms: frozenset[str]


def rotate(
    model: Model | Checkpoint,
    to: Model | Checkpoint,
    data: Iterable[Any] | None = None,
    *,
    verify: bool = True,
) -> tuple[Checkpoint, Checkpoint]:
    """Two models with RMSNorm in one basis of the residual stream: the same functions, nearer weights than by permutations.

    Heads and inner units are matched by weights in turn with the rotation.

    Args:
        model: the one that is turned.
        to: the one whose basis it gets; its gains are folded too, which is why a view of it is returned.
        data: one batch to run on; None: an example.
        verify: run both before and after.

    Returns:
        The turned model and the target with folded gains: views to be merged with one another. Curvature that is given unit by
        unit is refused with them, as it is not diagonal in another basis.

    Raises:
        ValueError: networks without RMSNorm, with LayerNorm, with gains of zero, or with tied embeddings and gains before the
            head, which would be folded into the input embeddings as well.

    >>> turned, target = rotate("other", "base")                                             # doctest: +SKIP
    >>> merge(target, [Task(target), Task(turned)], method="averaging")                      # doctest: +SKIP
    """
    call = None if data is None else calls_of(data)[0]
    target = open_checkpoint(to)
    own = like(open_checkpoint(model, base=target), target)
    symmetry = symmetry_of_checkpoint(own, call)
    check_same(own, target, symmetry, call)
    pair = Two(own, target, symmetry)
    module = module_with(model, own)
    stream = find_stream(module, symmetry, call or example(module), own.where)
    mine, theirs = pair.tables
    folds = [Fold(stream, symmetry, table) for table in (mine, theirs)]
    held = _without(symmetry, stream.group)
    names = [n for n in pair.weights.names if n not in stream.norms and n in held.dims]
    turn = torch.eye(symmetry.groups[stream.group].size)
    member: Member = held.identity()
    for _ in range(ROUNDS):
        read = lambda name, r=turn: (folds[1].tensor(name), folds[0].tensor(name, r))  # noqa: E731
        member = match(Pairs(held, names, read)).member
        turn = _procrustes(stream, symmetry, held, member, names, folds)

    def ways(name: str) -> list[Tensor | None]:
        found = folds[0].ways(name, turn)
        return [
            way if way is not None else index
            for way, index in zip(found, held.index(member, name), strict=True)
        ]

    other = Two(target, own, symmetry)
    turned = pair.moved_by(ways, exact=True)
    folded = other.moved_by(lambda name: folds[1].ways(name, None), exact=True)
    if verify:
        for two, view, given in ((pair, turned, model), (other, folded, to)):
            verified(two, view, given, call)
    return turned, folded


@dataclass(frozen=True)
class Fold:
    """One model's gains, multiplied into what reads them."""

    stream: Stream
    symmetry: Symmetry
    table: Checkpoint

    def ways(self, name: str, turn: Tensor | None) -> list[Tensor | None]:
        """How each dim of a tensor is folded and turned; None for dims that are not the stream's."""
        found: list[Tensor | None] = []
        for dim, segments in enumerate(self.symmetry.dims[name]):
            if segments != ((self.stream.group,),):
                found.append(None)
                continue
            gain = self.stream.gains.get(name) if (name, dim) in self.symmetry.consumed else None
            if name in self.stream.norms:
                found.append(torch.diag(1 / self.table[name].double()))
            elif gain is not None:
                scale = torch.diag(self.table[gain].double())
                found.append(scale if turn is None else turn.double() @ scale)
            else:
                found.append(None if turn is None else turn.double())
        return found

    def tensor(self, name: str, turn: Tensor | None = None) -> Tensor:
        """A tensor folded (and turned), in float32."""
        value = self.table[name].float()
        for dim, way in enumerate(self.ways(name, turn)):
            if way is not None:
                value = torch.tensordot(way.float(), value, dims=([1], [dim])).movedim(0, dim)
        return value


def _procrustes(
    stream: Stream, symmetry: Symmetry, held: Symmetry, member: Member, names: list[str], folds: list[Fold]
) -> Tensor:
    """The orthogonal matrix R with the largest sum of <to, R own> over all tensors of the stream: U V' of U S V' = sum to own'."""
    size = symmetry.groups[stream.group].size
    total = torch.zeros(size, size, dtype=torch.float64)
    for name in names:
        places = [dim for dim, segments in enumerate(symmetry.dims[name]) if segments == ((stream.group,),)]
        if not places:
            continue
        to, own = folds[1].tensor(name), moved(folds[0].tensor(name), held.index(member, name))
        for dim in places:
            total += (
                to.movedim(dim, 0).reshape(size, -1).double()
                @ own.movedim(dim, 0).reshape(size, -1).double().T
            )
    left, _, right = torch.linalg.svd(total)
    turn: Tensor = left @ right
    return turn.float()


def _without(symmetry: Symmetry, group: str) -> Symmetry:
    """A symmetry with the positions of one group held."""
    size = symmetry.groups[group].size

    def still(dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        return tuple(
            tuple(tuple(size if f == group else f for f in segment) for segment in dim) for dim in dims
        )

    groups = {name: known for name, known in symmetry.groups.items() if name != group}
    return replace(symmetry, groups=groups, dims={name: still(dims) for name, dims in symmetry.dims.items()})


def find_stream(module: nn.Module, symmetry: Symmetry, call: Call, where: str) -> Stream:
    """The stream that RMSNorm layers read, and which layers read these.

    Raises:
        ValueError: see `rotate`.
    """
    norms = {
        name: layer for name, layer in module.named_modules() if type(layer).__name__.endswith("RMSNorm")
    }
    dims = {f"{name}.weight": symmetry.dims.get(f"{name}.weight") for name in norms}
    groups = {
        held[0][0][0]
        for held in dims.values()
        if held and len(held[0]) == 1 and isinstance(held[0][0][0], str)
    }
    if not groups:
        raise GradmatchError(
            f"{where} has no residual stream that RMSNorm layers read: of networks with LayerNorm, which centres, permutations alone keep "
            "the function; take align",
            "unsupported_model",
            where,
        )
    group = str(max(groups, key=lambda name: symmetry.groups[str(name)].size))
    own = frozenset(name for name, held in dims.items() if held == (((group,),),))
    readers: dict[str, str] = {}
    spoken: dict[int, tuple[str, Tensor]] = {}
    hooks = []

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, result: Tensor) -> None:
            spoken[result.untyped_storage().data_ptr()] = (
                f"{name}.weight",
                result,
            )  # kept, so that its memory stays its own

        return hook

    def reader_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            known = spoken.get(inputs[0].untyped_storage().data_ptr())
            if known is not None:
                readers[f"{name}.weight"] = known[0]

        return hook

    for name, layer in module.named_modules():
        if f"{name}.weight" in own:
            hooks.append(layer.register_forward_hook(norm_hook(name)))
        elif isinstance(layer, torch.nn.Linear):
            hooks.append(layer.register_forward_pre_hook(reader_hook(name)))
    try:
        answer(module, call, where)
    finally:
        for hook in hooks:
            hook.remove()
    tensors = module.state_dict(keep_vars=True)
    known = {"Linear", "Embedding"}
    for name in symmetry.holders(group):
        layer = module.get_submodule(name.rpartition(".")[0])
        if name in own:
            if bool((tensors[name] == 0).any()):
                raise GradmatchError(
                    f"{where}: {name!r} has gains of zero, which cannot be folded", "unsupported_model", name
                )
        elif type(layer).__name__ not in known:
            raise GradmatchError(
                f"{where}: {name!r} of a {type(layer).__name__} acts on the residual stream position by position, so no rotation keeps the "
                "function; take align, which permutes",
                "unsupported_model",
                name,
            )
    for name, gain in readers.items():
        twins = [other for other, tensor in tensors.items() if tensor is tensors[name] and other != name]
        if twins and not bool((tensors[gain] == 1).all()):
            raise GradmatchError(
                f"{where}: {name!r} is tied to {twins[0]!r}, and the gain {gain!r} would be folded into both; untie them "
                "(tie_word_embeddings=False, with a copy) before rotating",
                "tied",
                name,
            )
    return Stream(group, readers, own)
