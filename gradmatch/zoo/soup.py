"""`merge(method="greedy_soup")`: models enter a uniform average, best first, as long as the score does not fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.merging import execute, prepare
from gradmatch.models.opening import open_checkpoint
from gradmatch.plan.opened import task_names
from gradmatch.zoo.judge import Judge, Score
from gradmatch.zoo.selecting import Climb
from gradmatch.zoo.strategies import STRATEGIES

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model, Task


def greedy_soup(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    *,
    score: Score | None = None,
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
        The average of the chosen models, with the choice in the report's notes. Models whose score is no number are left out.

    Raises:
        ValueError: no score function, no tasks, or no model that has a score.
        TypeError: a score that cannot be called.
        FileExistsError: `out` exists, found before anything is scored.
    """
    if score is None:
        raise GradmatchError(
            "greedy_soup needs score=..., a function of a state dict (larger is better), so it is called from Python; the command is "
            "`gradmatch zoo select`",
            "bad_choice",
        )
    if not tasks:
        raise GradmatchError("no tasks to merge; pass at least one Task(model)", "bad_tasks")
    if out is not None:
        from gradmatch.output.publishing import check_absent, place

        check_absent(place(out), overwrite)
    running = {name: options.pop(name) for name in ("batches", "progress") if name in options}
    allow_pickle = options.get("allow_pickle", False)
    opened = open_checkpoint(base, allow_pickle=allow_pickle)
    named = {
        name: replace(
            task,
            model=open_checkpoint(task.model, base=opened, allow_pickle=allow_pickle),
            name=name,
            weight=1.0,
        )
        for name, task in zip(task_names(tasks), tasks, strict=True)
    }
    prepare(
        opened, list(named.values()), method="averaging", **options
    )  # what is wrong with all of them is told at once
    judge = Judge(opened, named, score, method="averaging", options=options)
    found = Climb(judge, STRATEGIES["greedy_soup"], "greedy_soup", lambda: None).up()
    alone = {
        name: line["score"][0]
        for line in judge.journal.of("evaluation")
        if len(line["weights"]) == 1 and line["score"]
        for name in line["weights"]
    }
    note = f"greedy soup of {', '.join(found.weights)}: score {found.score:g}; alone " + ", ".join(
        f"{name} {value:.6g}" for name, value in alone.items()
    )
    made = prepare(opened, found.tasks, method="averaging", notes=[note], **options)
    made.told["method"] = "greedy_soup"
    return execute(made, out, overwrite=overwrite, **running)
