"""Greedy soup: models enter a uniform average, best first, as long as the score does not fall."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.merging import execute, merge, prepare

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model, Task


def greedy_soup(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    *,
    score: Callable[[Mapping[str, Tensor]], float] | None = None,
    out: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> Mapping[str, Tensor]:
    """Wortsman et al. 2022: sort the models by score; add each to the average where that does not lower the score.

    Args:
        base: as for `merge`; plays no role in the average.
        tasks: the candidates.
        score: state dict -> a number, larger is better (on held-out data).
        out: folder for the result, or None.
        overwrite: replace the merge that stands there.
        **options: as for `merge`.

    Returns:
        The average of the chosen models, with the choice in the report's notes.

    Raises:
        ValueError: no score function, no tasks, or a score that is NaN.
        TypeError: a score that cannot be called.
        FileExistsError: `out` exists, found before anything is scored.
    """
    import math

    from gradmatch.plan.opened import task_names

    if score is None:
        raise GradmatchError(
            "greedy_soup needs score=..., a function of a state dict (larger is better), so it is called from Python",
            "bad_choice",
        )
    if not callable(score):
        raise TypeError(f"score must be a function of a state dict, not {type(score).__name__}")
    if not tasks:
        raise GradmatchError("no tasks to merge; pass at least one Task(model)", "bad_tasks")

    if out is not None:
        from gradmatch.output.publishing import check_absent, place

        check_absent(place(out), overwrite)

    def scored(chosen: Sequence[int]) -> float:
        value = float(score(merge(base, [tasks[i] for i in chosen], method="averaging", **options)))
        if math.isnan(value):
            raise GradmatchError(
                f"the score of {[names[i] for i in chosen]} is NaN; scores must be numbers that compare",
                "not_finite",
            )
        return value

    names = task_names(tasks)
    alone = [scored([i]) for i in range(len(tasks))]
    order = sorted(range(len(tasks)), key=lambda i: (-alone[i], names[i]))
    chosen, best = [order[0]], alone[order[0]]
    for candidate in order[1:]:
        value = scored([*chosen, candidate])
        if value >= best:
            chosen, best = [*chosen, candidate], value
    note = f"greedy soup of {', '.join(names[i] for i in chosen)}: score {best:g}; alone {[round(a, 6) for a in alone]}"
    running = {
        "overwrite": overwrite,
        "batches": options.pop("batches", None),
        "progress": options.pop("progress", False),
    }
    made = prepare(base, [tasks[i] for i in chosen], method="averaging", notes=[note], **options)
    made.told["method"] = "greedy_soup"
    return execute(made, out, **running)
