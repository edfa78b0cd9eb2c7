"""Which axes of a network's tensors are one: a module is run once on an example, and every operation tells which axes meet.

What an operation does with axes is known for the few dozen kernels that networks are made of (torch's aten operators). An
operator that is not known pins all axes that it touches, so that a network is never given a symmetry that it lacks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradmatch.rebasin.axes import Axis, concat, cut, find, leaves, pin, product, split, unify

if TYPE_CHECKING:
    from torch import Tensor, nn

Axes = list[Axis]
SAME = {"_to_copy", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "dropout", "native_dropout"}  # fmt: skip
RESHAPED = {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "_reshape_alias"}
REDUCED = {"sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "norm", "linalg_vector_norm", "logsumexp", "any", "all"}  # fmt: skip
SOFTMAX = {"_softmax", "_log_softmax", "_safe_softmax"}
POOLED = {"max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d", "max_pool2d", "adaptive_avg_pool2d", "constant_pad_nd"}  # fmt: skip
BATCH_NORM = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm", "_batch_norm_no_update"}  # fmt: skip
UNIFORM = {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # fmt: skip
QUIET = {"empty", "arange", "scalar_tensor", "empty_like", "new_empty", "fill_", "zero_"}


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Axes of every tensor that a run touches.

    Args:
        tensors: of the module by name, parameters and persistent buffers; names of one tensor share it.

    Attributes:
        held: axes of the named tensors.
        meetings: axes of every tensor that was met, for what always occurs together.
        mixed: (axes that were summed or compared over, the others of that tensor).
        consumed: names and dims of tensors that were multiplied into what comes before them.
        unknown: operators that pinned what they touched.
        outputs: axes of what each layer without layers of its own gave.
        used: ids of all tensors that an operator was given.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, tuple[Tensor, Axes]] = {}
        self._origin: dict[int, list[tuple[str, int] | None]] = {}
        self.meetings: list[Axes] = []
        self.mixed: list[tuple[Axes, Axes]] = []
        self.consumed: set[tuple[str, int]] = set()
        self.unknown: set[str] = set()
        self.used: set[int] = set()
        self.outputs: dict[str, Axes] = {}
        self.held: dict[str, Axes] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in self._seen:
                self._keep(tensor, [Axis(size) for size in tensor.shape])
                self._origin[id(tensor)] = [(name, dim) for dim in range(tensor.dim())]
            self.held[name] = self._seen[id(tensor)][1]

    def axes(self, tensor: Tensor) -> Axes:
        """Those of a tensor; of one that comes from nowhere (inputs, masks, sinusoids), pinned ones."""
        if id(tensor) not in self._seen:
            self._keep(tensor, [Axis(size, pinned=True) for size in tensor.shape])
        return self._seen[id(tensor)][1]

    def _keep(self, tensor: Tensor, axes: Axes) -> None:
        self._seen[id(tensor)] = (tensor, axes)  # the tensor too: its id must stay its own
        self.meetings.append(axes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            return True  # what code asks of values: whether all of them are as usual
        out = func(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        self.used.update(map(id, tensors))
        results = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        handler = HANDLERS.get(name)
        if handler is None and (torch.Tag.pointwise in func.tags or name in SAME):
            handler = _pointwise
        made: Any = None
        if handler is not None:
            made = handler(self, func, args, kwargs, results, tensors)
        elif name in UNIFORM:
            made = [[Axis(size) for size in result.shape] for result in results]  # one value: any order
        elif name not in QUIET:
            known = {id(leaf) for axes in self.held.values() for leaf in free(axes)}
            if any(id(leaf) in known for tensor in tensors for leaf in free(self.axes(tensor))):
                self.unknown.add(name)
            for tensor in tensors:
                for axis in self.axes(tensor):
                    pin(axis)
        for number, result in enumerate(results):
            axes = made[number] if made is not None and number < len(made) else None
            if axes is not None and [find(a).size for a in axes] == list(result.shape):
                held = self._seen.get(id(result))
                if held is not None:
                    for a, b in zip(held[1], axes, strict=True):
                        unify(a, b)
                else:
                    self._keep(result, list(axes))
            else:
                self.axes(result)
        return out

    def origin(self, tensor: Tensor) -> list[tuple[str, int] | None]:
        """Of every dim the named tensor that it is one of, if any."""
        return self._origin.get(id(tensor)) or [None] * tensor.dim()

    def carry(self, result: Tensor, origin: Iterable[tuple[str, int] | None]) -> None:
        """A result whose dims are those of a named tensor still."""
        self._origin[id(result)] = list(origin)

    def consume(self, tensor: Tensor, dim: int) -> None:
        """A dim over which a product is summed."""
        found = self.origin(tensor)[dim]
        if found is not None:
            self.consumed.add(found)

    def mix(self, summed: Axes, others: Axes) -> None:
        """Positions of some axes are brought together, those of others stay apart."""
        self.mixed.append((summed, others))


def trace(module: nn.Module, run: Callable[[], Any]) -> Trace:
    """Run a module and tell the axes of its tensors; those of its outputs are pinned.

    Args:
        module: in evaluation mode.
        run: one forward pass, whose result is the module's output.
    """
    found = Trace(dict(module.state_dict(keep_vars=True)))

    def observed(name: str) -> Any:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            if isinstance(result, torch.Tensor):
                found.outputs[name] = found.axes(result)

        return hook

    hooks = [
        layer.register_forward_hook(observed(name))
        for name, layer in module.named_modules()
        if not any(True for _ in layer.children())
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer
    try:
        with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # of the flags themselves
            with torch.backends.mkldnn.flags(enabled=False), found:
                out = run()
    finally:
        for hook in hooks:
            hook.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
    values = out.values() if isinstance(out, Mapping) else [out]
    for tensor in (one for one in tree_leaves(list(values)) if isinstance(one, torch.Tensor)):
        for axis in found.axes(tensor):
            pin(axis)
    return found


def _pointwise(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    return [_met(t, tensors, out[0].dim())] if out else None


def _met(t: Trace, tensors: Sequence[Tensor], dims: int) -> Axes:
    """Axes of the broadcast of some tensors, which are made one dim by dim."""
    met: list[Axis | None] = [None] * dims
    for tensor in tensors:
        axes = t.axes(tensor)
        for place, axis in enumerate(axes, dims - len(axes)):
            if find(axis).size == 1 or place < 0:
                continue
            known = met[place]
            if known is None:
                met[place] = axis
            else:
                unify(known, axis)
    return [axis if axis is not None else Axis(1, pinned=True) for axis in met]


def _reshaped(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes, sizes = list(t.axes(tensors[0])), list(out[0].shape)
    made: Axes = []
    have = [a for a in axes if find(a).size > 1]
    want = list(sizes)
    while want:
        size = want.pop(0)
        if size == 1:
            made.append(Axis(1, pinned=True))
            continue
        group, sizes_out = [have.pop(0)], [size]
        held, needed = find(group[0]).size, size
        while held != needed:
            if held < needed:
                group.append(have.pop(0))
                held *= find(group[-1]).size
            else:
                sizes_out.append(want.pop(0))
                needed *= sizes_out[-1]
        whole = group[0] if len(group) == 1 else product(group)
        parts = [whole] if len(sizes_out) == 1 else split(whole, sizes_out)
        made += [
            Axis(1, pinned=True) if size == 1 else part for part, size in zip(parts, sizes_out, strict=True)
        ]
    return [made]


def _permuted(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    name, order = func._overloadpacket.__name__, list(range(tensors[0].dim()))
    if name == "permute":
        order = [dim % len(order) for dim in args[1]]
    else:
        first, second = (-1, 0) if name == "t" else (args[1], args[2])
        if len(order) > 1:
            order[first], order[second] = order[second], order[first]
    origin = t.origin(tensors[0])
    t.carry(out[0], [origin[dim] for dim in order])
    return [[t.axes(tensors[0])[dim] for dim in order]]


def _expanded(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes, shape = t.axes(tensors[0]), out[0].shape
    axes = [Axis(1, pinned=True)] * (len(shape) - len(axes)) + list(axes)
    # copies of one thing may be in any order
    return [[a if find(a).size == size else Axis(size) for a, size in zip(axes, shape, strict=True)]]


def _matmul(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    name = func._overloadpacket.__name__
    bias = tensors[0] if name in ("addmm", "baddbmm") else None
    a, b = tensors[1:3] if bias is not None else tensors[:2]
    left, right = t.axes(a), t.axes(b)
    if name == "linear":  # x (..., in), weight (out, in)
        unify(left[-1], right[1])
        t.consume(b, 1)
        t.mix([left[-1]], [*left[:-1], right[0]])
        made = [*left[:-1], right[0]]
        bias = tensors[2] if len(tensors) > 2 else None
    else:
        inner = 0 if len(right) == 1 else len(right) - 2
        unify(left[-1], right[inner])
        t.consume(b, inner)
        t.consume(a, len(left) - 1)
        for one, other in zip(left[:-2], right[:-2], strict=False):
            unify(one, other)
        rest = [axis for dim, axis in enumerate(right) if dim != inner]
        t.mix([left[-1]], left[:-1])
        t.mix([left[-1]], rest)
        made = [*left[:-1], *(rest[len(right) - 2 :] if len(right) > 1 else [])]
    if bias is not None:
        for axis, own in zip(reversed(made), reversed(t.axes(bias)), strict=False):
            if find(own).size > 1:
                unify(axis, own)
    return [made]


def _convolved(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    x, weight, bias = args[0], args[1], args[2]
    transposed, groups = bool(args[6]), int(args[8])
    data, held = t.axes(x), t.axes(weight)
    for axis in (*held[2:], *data[2:]):
        pin(axis)
    into, inside = (0, 1) if not transposed else (1, 0)
    if groups == 1:
        unify(data[1], held[inside])
        made = held[into]
    else:
        outer, width = split(data[1], [groups, find(data[1]).size // groups])
        if transposed:  # weight (in, out / groups, ...)
            unify(product([outer, width]), held[0])
            made = product([outer, held[1]])
        else:  # weight (out, in / groups, ...)
            if find(held[1]).size > 1:
                unify(width, held[1])
            own, each = split(held[0], [groups, find(held[0]).size // groups])
            if groups > 1:
                unify(own, outer)
            made = product([own, each])
    if groups == 1 or find(held[1]).size > 1:
        t.consume(weight, inside)
    t.mix([held[inside]], [data[0], *data[2:], held[into]])
    if bias is not None:
        unify(made, t.axes(bias)[0])
    return [[data[0], made, *(Axis(size, pinned=True) for size in out[0].shape[2:])]]


def _channelwise(
    t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]
) -> Any:
    axes = t.axes(tensors[0])
    for other in tensors[1:]:
        unify(axes[1], t.axes(other)[0])
    return [axes]


def _layer_norm(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes, count = t.axes(tensors[0]), len(args[1])
    for other in tensors[1:]:
        for axis, own in zip(axes[-count:], t.axes(other), strict=True):
            unify(axis, own)
    t.mix(axes[-count:], axes)
    return [axes]


def _group_norm(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes, groups = t.axes(tensors[0]), int(args[6])
    if groups > 1:
        split(axes[1], [groups, find(axes[1]).size // groups])
    for other in tensors[1:]:
        unify(axes[1], t.axes(other)[0])
    return [axes]


def _reduced(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes = t.axes(tensors[0])
    where = {argument.name: place for place, argument in enumerate(func._schema.arguments)}
    dims = kwargs.get("dim", args[where["dim"]] if len(args) > where.get("dim", 99) else None)
    dims = list(range(len(axes))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(axes) for dim in dims} if axes else set()
    t.mix([axes[dim] for dim in gone], axes)
    if out[0].dim() == len(axes):
        made = [Axis(1, pinned=True) if dim in gone else axis for dim, axis in enumerate(axes)]
    else:
        made = [axis for dim, axis in enumerate(axes) if dim not in gone]
    if len(out) > 1 and "var_mean" not in func._overloadpacket.__name__:
        return [made]  # positions of a maximum: pinned by themselves, and of what they tell nothing is kept
    return [made] * len(out)


def _softmax(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes = t.axes(tensors[0])
    t.mix([axes[args[1]]], axes)
    return [axes]


def _pooled(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes = t.axes(tensors[0])
    for axis in axes[2:]:
        pin(axis)
    if func._overloadpacket.__name__ == "constant_pad_nd" and len(args[1]) > 2 * (len(axes) - 2):
        return None
    return [[*axes[:2], *(Axis(size, pinned=True) for size in out[0].shape[2:])]] * len(out)


def _embedded(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    weight = t.axes(tensors[0])
    pin(weight[0])
    return [[*t.axes(tensors[1]), *weight[1:]]]


def _sliced(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes = list(t.axes(tensors[0]))
    given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    dim, start, stop, step = given[0] % len(axes), given[1], given[2], given[3]
    size = find(axes[dim]).size
    start, stop = (
        min(max((start or 0) + (size if (start or 0) < 0 else 0), 0), size),
        size if stop is None else stop,
    )
    stop = min(max(stop + (size if stop < 0 else 0), start), size)
    if step != 1 and size > 1:
        pin(axes[dim])
        axes[dim] = Axis(out[0].shape[dim], pinned=True)
    else:
        axes[dim] = cut(axes[dim], start, stop)
    return [axes]


def _selected(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes, dim = t.axes(tensors[0]), args[1] % tensors[0].dim()
    pin(axes[dim])
    return [[axis for place, axis in enumerate(axes) if place != dim]] * len(out)


def _unbound(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    dim = args[1] if len(args) > 1 else 0
    return _selected(t, func, (args[0], dim), kwargs, out, tensors)


def _split(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    axes = t.axes(tensors[0])
    dim = (kwargs.get("dim", args[2] if len(args) > 2 else 0)) % len(axes)
    made, start = [], 0
    for result in out:
        stop = start + result.shape[dim]
        made.append([cut(axis, start, stop) if place == dim else axis for place, axis in enumerate(axes)])
        start = stop
    return made


def _joined(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out[0].dim()
    parts = [one for one in tensors if one.dim() == out[0].dim()]
    first = list(t.axes(parts[0]))
    for other in parts[1:]:
        for place, axis in enumerate(t.axes(other)):
            if place != dim:
                unify(first[place], axis)
    first[dim] = concat([t.axes(one)[dim] for one in parts])
    return [first]


def _stacked(t: Trace, func: Any, args: Any, kwargs: Any, out: list[Tensor], tensors: list[Tensor]) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out[0].dim()
    made = _met(t, tensors, tensors[0].dim())
    return [[*made[:dim], Axis(len(tensors), pinned=True), *made[dim:]]]


HANDLERS: dict[str, Any] = {
    **dict.fromkeys(SAME, _pointwise), **dict.fromkeys(RESHAPED, _reshaped), **dict.fromkeys(("t", "transpose", "permute"), _permuted),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "mv"), _matmul), **dict.fromkeys(REDUCED, _reduced),
    **dict.fromkeys(SOFTMAX, _softmax), **dict.fromkeys(POOLED, _pooled), **dict.fromkeys(BATCH_NORM, _channelwise),
    "expand": _expanded, "convolution": _convolved, "_convolution": _convolved, "native_layer_norm": _layer_norm, "layer_norm": _layer_norm,
    "native_group_norm": _group_norm, "embedding": _embedded, "slice": _sliced, "select": _selected, "unbind": _unbound,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"), _split), "cat": _joined, "stack": _stacked,
}  # fmt: skip


def free(axes: Iterable[Axis]) -> Iterator[Axis]:
    """The leaves that may be moved."""
    for axis in axes:
        yield from (leaf for leaf in leaves(axis) if not leaf.pinned)
