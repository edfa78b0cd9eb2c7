"""Which tensors of which models belong together, by name, shape and kind; what a model lacks, or has beyond the base."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradmatch.common.settings import FIRST, layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.models.adapters import UNTIE
from gradmatch.models.stores import Spec, equal
from gradmatch.models.structure import structure
from gradmatch.models.views import unsaved_of

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.plan.inputs import Inputs, OpenTask
    from gradmatch.plan.step import Plan


def participants(name: str, spec: Spec, result: Plan) -> tuple[int, ...]:
    """Positions of the tasks that have this tensor in this shape.

    Raises:
        ValueError: a task lacks it and no policy was chosen, or its shape or kind differs.
    """
    tasks = []
    for position, task in enumerate(result.inputs.tasks):
        if name not in task.checkpoint:
            if result.request.missing == "error" and name not in result.inputs.unsaved:
                raise GradmatchError(
                    f"tensor {name!r} {spec} of the base is missing in {task.name} ({task.checkpoint.where}); "
                    + (
                        _called_otherwise(name, result.inputs.base, task.checkpoint)
                        or "pass missing='base' to let tasks without a tensor take no part in it"
                        + _prefix_hint(result.inputs.base, task.checkpoint)
                    ),
                    "models_differ",
                    name,
                )
            result.notes.append(f"{name}: missing in {task.name}, which takes no part in it")
            continue
        found = task.checkpoint.spec(name)
        if found.shape != spec.shape:
            raise GradmatchError(
                f"tensor {name!r} has shape {list(spec.shape)} in the base and {list(found.shape)} in {task.name}; "
                "only models of one architecture can be merged (heads='base' or 'keep-per-task' sets heads aside, "
                "embeddings='intersect' or 'union' aligns vocabularies)",
                "shape_mismatch",
                name,
            )
        if not found.floating:
            raise GradmatchError(
                f"tensor {name!r} is {spec.dtype} in the base and {found.dtype} in {task.name}; convert one of them",
                "models_differ",
                name,
            )
        tasks.append(position)
    return tuple(tasks)


def check_sizes(base: Checkpoint, tasks: Sequence[OpenTask]) -> None:
    """Tell models of another size apart from models with another head or vocabulary.

    Raises:
        ValueError: tensors inside the layers, or most of all tensors, have another shape than the base's.
    """
    for task in tasks:
        shared = [name for name in base if name in task.checkpoint and base.spec(name).floating]
        differ = [name for name in shared if task.checkpoint.spec(name).shape != base.spec(name).shape]
        inside = [name for name in differ if layer_of(name) is not None]
        if inside or len(differ) > len(shared) / 2:
            name = (inside or differ)[0]
            raise GradmatchError(
                f"tensor {name!r} has shape {list(base.spec(name).shape)} in the base and "
                f"{list(task.checkpoint.spec(name).shape)} in {task.name}, and so have {len(differ) - 1} more of "
                f"{len(shared)} tensors another; only models of one architecture and size can be merged",
                "shape_mismatch",
                name,
            )


def check_extra(result: Plan, heads: Sequence[str]) -> None:
    """Tensors that a task has and the base lacks: heads, an untied copy of the embeddings, or an error.

    Raises:
        ValueError: extra tensors and no policy for them.
    """
    base = result.inputs.base
    for position, task in enumerate(result.inputs.tasks):
        extra = [name for name in task.checkpoint if name not in base]
        tied = [name for name in extra if _is_tied(name, base, task.checkpoint)]
        own_heads = [
            name for name in task.checkpoint if any(name == h or name.startswith(h + ".") for h in heads)
        ]
        rest = [name for name in extra if name not in tied and name not in own_heads]
        if rest:
            computed = unsaved_of(task.checkpoint)
            rest = [name for name in rest if name not in computed]
        if rest and result.request.missing == "error":
            raise GradmatchError(
                f"{task.name} ({task.checkpoint.where}) holds {len(rest)} tensor(s) that the base lacks, first {rest[0]!r} "
                f"{task.checkpoint.spec(rest[0])}; "
                + (
                    _untied(rest[0], base)
                    or _called_otherwise(rest[0], task.checkpoint, base)
                    or "pass missing='base' to drop them, or heads='keep-per-task' if it is a head"
                    + _prefix_hint(base, task.checkpoint)
                ),
                "models_differ",
                task.name,
            )
        if tied:
            result.notes.append(
                f"{task.name}: {', '.join(tied)} left out: tied to a tensor of the base, as there"
            )
        result.dropped += [f"{task.name}: {name}" for name in rest]
        if rest:
            result.notes.append(
                f"{task.name}: {', '.join(rest[:5])}{', ...' * (len(rest) > 5)} dropped: the base lacks it"
            )
        if result.request.heads == "keep-per-task" and own_heads:
            result.heads[position] = own_heads


def check_kinds(name: str, spec: Spec, inputs: Inputs) -> None:
    """Integers of the base are copied: tables and counters, which cannot be merged.

    Raises:
        ValueError: a task has floats there, or another matrix: these are quantised weights, not a buffer.
    """
    for task in inputs.tasks:
        if name not in task.checkpoint:
            continue
        found = task.checkpoint.spec(name)
        if found.floating:
            raise GradmatchError(
                f"tensor {name!r} is {spec.dtype} in the base and {found.dtype} in {task.name}; quantised "
                "weights cannot be merged: pass the unquantised base",
                "quantised",
                name,
            )
        if len(spec.shape) > 1 and not same_values(name, inputs.base, task.checkpoint):
            raise GradmatchError(
                f"tensor {name!r} holds integers, {spec} in the base and {found} in {task.name}, and they differ; quantised weights cannot "
                "be merged: pass the unquantised models. If it is a table, call it a head from Python (head_names=[...], "
                "heads='base'), so that the base's is kept",
                "quantised",
                name,
            )


def same_values(name: str, one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two models hold the same values, all of them, in the narrower of their dtypes."""
    import torch

    a, b = one[name], other[name]
    return a.shape == b.shape and (torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype)))


def _untied(name: str, base: Checkpoint) -> str:
    """What to say of a task's own head where the base ties it to its embeddings: it must not be given up, or ""."""
    known = structure(base)
    others = [other for other in known.ties.get(name, ()) if other != name] if known else []
    return f"the base ties it to {others[0]!r}: {UNTIE}, or pass missing='base' to drop it" if others else ""


def _called_otherwise(name: str, own: Checkpoint, other: Checkpoint) -> str:
    """What to say where the other model may hold a tensor under another name: it must not be given up then, or ""."""
    alike = [one for one in other if one not in own and other.spec(one).shape == own.spec(name).shape]
    matched = all(
        hasattr(getattr(structure(one), "module", None), "base_model_prefix") for one in (own, other)
    )
    if not alike or matched or _prefix_hint(own, other):
        return ""
    return (
        f"{other.where} has {min(alike, key=lambda one: _distance(name, one))!r} of that shape instead: give both as folders whose "
        "config.json names their architecture, so that names are matched as transformers does"
    )


def _distance(one: str, other: str) -> float:
    return -difflib.SequenceMatcher(None, one, other).ratio()


def _prefix_hint(base: Checkpoint, task: Checkpoint) -> str:
    """What to say where the names of two models differ by a prefix alone, as those of a bare model and one with a head do."""
    ours, theirs = set(base), set(task)
    for longer, shorter, owner in ((theirs, ours, "the task"), (ours, theirs, "the base")):
        for prefix in sorted({name.partition(".")[0] + "." for name in longer}):
            inner = {name.removeprefix(prefix) for name in longer if name.startswith(prefix)}
            if len(inner & shorter) > len(shorter) / 2:
                return f"; names of {owner} begin with {prefix!r}: one of the two is a bare model, load both as the same class"
    if not ours & theirs:
        return "; in fact the two share no tensor at all: they are models of different architectures"
    return ""


def _is_tied(name: str, base: Checkpoint, task: Checkpoint) -> bool:
    """Whether a task's tensor is another name of one that the base has: by its memory, or an equal lm_head by the configs."""
    held = task.aliases.get(name, name)
    if any(task.aliases.get(other, other) == held for other in task if other != name and other in base):
        return True
    ties = all(model.config and model.config.get("tie_word_embeddings", True) for model in (base, task))
    if not name.endswith("lm_head.weight") or not ties:
        return False
    return any(
        task.spec(other) == task.spec(name)
        and equal(task.store, held, task.store, task.aliases.get(other, other))
        for other in task
        if other in base and FIRST.search(other)
    )
