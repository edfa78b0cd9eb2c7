"""What to do with tensors that cannot simply be merged: heads, BatchNorm statistics, ties."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.common.settings import FIRST, idle, layer_of
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import nearest
from gradmatch.models.adapters import UNTIE
from gradmatch.plan.matching import same_values

if TYPE_CHECKING:
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.plan.inputs import OpenTask
    from gradmatch.plan.request import Request

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def check_file_names(names: Sequence[str]) -> None:
    """Refuse task names that cannot name the file of a head kept per task.

    Raises:
        ValueError: a name that would leave its folder.
    """
    for name in names:
        if name.startswith(".") or any(sign in name for sign in "/\\\0"):
            raise GradmatchError(
                f"heads='keep-per-task' writes a file named after each task, and {name!r} is no plain file name; "
                "give the task another name",
                "models_differ",
                name,
            )


def is_statistic(name: str) -> bool:
    """Whether a buffer is a BatchNorm statistic."""
    return name.rpartition(".")[2] in STATISTICS


def batchnorm_action(
    name: str, base: Checkpoint, tasks: Sequence[OpenTask], request: Request
) -> tuple[str, str]:
    """("copy" | "average" | "", why) for a tensor that may be a BatchNorm statistic.

    Raises:
        ValueError: the statistics differ between the models and no policy was chosen.
    """
    if not is_statistic(name):
        return "", ""
    if request.batchnorm == "error":
        for task in tasks:
            floating = base.spec(name).floating
            if name in task.checkpoint and floating and not same_values(name, base, task.checkpoint):
                raise GradmatchError(
                    f"BatchNorm statistic {name!r} differs between the base and {task.name}, and merged weights have "
                    "statistics of their own; choose batchnorm='recalibrate' (with batches=...), 'average' or 'copy'",
                    "models_differ",
                    name,
                )
        return "copy", "BatchNorm statistic, the same everywhere"
    if request.batchnorm == "copy" or not base.spec(name).floating:
        return "copy", "BatchNorm statistic: the base's"
    why = "BatchNorm statistic: mean" + (", then recalibrated" if request.batchnorm == "recalibrate" else "")
    return "average", why


def head_prefixes(base: Checkpoint, tasks: Sequence[OpenTask], request: Request) -> list[str]:
    """Modules that are heads: their tensors differ in shape between models or exist in some only, outside trunk and embeddings.

    A whole module counts as soon as one of its tensors differs, since a head is used as a whole. Empty unless a policy
    for heads was chosen; then also what `head_names` matches.

    Raises:
        ValueError: heads differ and no policy was chosen.
    """
    models = [base, *(task.checkpoint for task in tasks)]
    names = dict.fromkeys(name for model in models for name in model)
    given = [
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in request.head_names)
    ]
    if request.heads == "error":
        for name in names:
            specs = [model.spec(name) for model in models if name in model]
            shapes = {spec.shape for spec in specs if spec.floating}  # buffers of integers are the base's
            if len(shapes) > 1 and not FIRST.search(name) and layer_of(name) is None:
                found = {
                    task.name: list(task.checkpoint.spec(name).shape)
                    for task in tasks
                    if name in task.checkpoint
                }
                where = list(base.spec(name).shape) if name in base else "absent"
                raise GradmatchError(
                    f"head {name!r} differs: {where} in the base, {found} in the tasks; choose heads='keep-per-task' "
                    "(saved beside the trunk) or heads='base'; if it is no head, these are models of different architectures",
                    "models_differ",
                    name,
                )
        return []
    trunk = [name for name in names if layer_of(name) is not None or FIRST.search(name)]
    prefixes = dict.fromkeys(given)
    for name in names:
        differs = len({model.spec(name).shape if name in model else None for model in models}) > 1
        if differs and name not in trunk:
            prefixes.setdefault(_widest(name, trunk, base))
    return list(prefixes)


def _widest(name: str, trunk: Sequence[str], base: Checkpoint) -> str:
    """The shortest dotted prefix of a name that is a head: nothing of the trunk lies under it, nor most of the base's weights."""
    sizes = {other: base.spec(other).numel for other in base}
    parts = name.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        held = sum(size for other, size in sizes.items() if other.startswith(prefix))
        if held <= sum(sizes.values()) / 2 and not any(other.startswith(prefix) for other in trunk):
            return prefix.removesuffix(".")
    return name


def idle_patterns(base: Checkpoint, tasks: Sequence[OpenTask], request: Request) -> Iterator[str]:
    """What to say of name patterns that settle nothing: misspelt, made for another architecture, or behind a wider one."""
    names = list(base)
    settings: list[tuple[str, Any]] = [(f"the weight of {task.name}", task.weight) for task in tasks]
    settings += [
        (f"option {key} of {task.name}", value) for task in tasks for key, value in task.options.items()
    ]
    settings += list(request.rule_options.items())
    settings += [
        (f"{edit}: {key}", value)
        for edit, own in (*request.edits, *request.after_edits)
        for key, value in own.items()
    ]
    settings += [("head_names", {pattern: None}) for pattern in request.head_names]
    words = dict.fromkeys((*names, *(part for name in names for part in name.split("."))))
    for what, setting in settings:
        for pattern, matches in idle(setting, names):
            if matches:
                yield f"{what}: {pattern!r} is never used, patterns before it match all of its tensors; put it first"
            else:
                hint = nearest(pattern.strip("*."), words) or f"; names are such as {names[-1]!r}"
                yield f"{what}: {pattern!r} matches no tensor{hint}"


def tied_differently(base: Checkpoint, tasks: Sequence[OpenTask]) -> None:
    """Refuse a task that has two different tensors where the base has one under two names.

    Raises:
        ValueError: the tensors are tied in the base and differ in a task.
    """
    for alias, name in base.aliases.items():
        for task in tasks:
            model = task.checkpoint
            if alias not in model or name not in model:
                continue
            one, other = (model.aliases.get(key, key) for key in (alias, name))
            if one != other and not (
                model[alias].shape == model[name].shape and bool((model[alias] == model[name]).all())
            ):
                raise GradmatchError(
                    f"{alias!r} is tied to {name!r} in the base but differs from it in {task.name}; {UNTIE}, or tie the task's",
                    "models_differ",
                    alias,
                )
