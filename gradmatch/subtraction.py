"""The public calls that take away: subtract and analogy; and the largest weight that the base's curvature allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradmatch.common.kinds import plain
from gradmatch.common.settings import numbers, times
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.names import choose
from gradmatch.merging import RUNNING, CurvatureLike, execute, merge, prepare
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Task, is_model
from gradmatch.models.tokenizers import check_tokenizers
from gradmatch.output.publishing import check_absent, place
from gradmatch.rules import RULES, removals

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.estimators.curvature import Curvature
    from gradmatch.merging import Merged
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model
    from gradmatch.plan.step import Plan

Gradient = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]
MOST_STEPS = 3  # re-linearised steps of ascent
SHARES = (0.001, 0.01, 0.1)
BINS = 65_536  # by the upper 16 bits of a float32: bins 0.8 % wide


def subtract(
    base: Model | Checkpoint,
    task: Task | Model | Iterable[Task] | None,
    *,
    add: Task | Iterable[Task] = (),
    gradient: CurvatureLike | Gradient | None = None,
    steps: int = 1,
    base_curvature: CurvatureLike | float | None = None,
    weight: float = 1.0,
    keep: float = 0.1,
    guard: str = "floor",
    method: str = "removal",
    measured: Mapping[str, Any] | None = None,
    **options: Any,
) -> Merged | Checkpoint:
    """Remove what one or several tasks taught: Eq. 13 of Daheim et al. 2024, theta0 - alpha (H0 - alpha H_t)^-1 (H0 + H_t) tau_t.

    Args:
        base: the model to remove from.
        task: fine-tuned from the base on what is to go, with its curvature; one or several. Negation and "guarded" take a bare model too, "ascent"
            takes None.
        add: with "guarded": tasks with their curvatures that are added in the same call, by Eq. 12, which what is removed then spares
            too (the rule "signed").
        gradient: for "ascent": a curvature with the measured gradient, at the base's weights, of the summed loss on what is to go; or
            a function that returns this gradient by parameter name at any weights, such as `Objective.gradient`.
        steps: of "ascent" with such a function: the path is walked in 1 to 3 steps, and the gradient taken anew at each.
        base_curvature: the base's curvature; must stay above the tasks'.
        weight: alpha > 0, for all tasks, times each task's own weight; those of `add` keep theirs.
        keep: at least keep * H0 must remain of H0 - alpha H_t.
        guard: how: "floor" floors it there; "scale" scales H_t down, which also bounds the step where the base knows next to
            nothing (see `gradmatch.rules.removal.removal`).
        method: "removal"; "guarded", -alpha lambda (H0 + lambda I)^-1 tau; "ascent", +alpha (H0 + lambda I)^-1 g (both with the option
            `damping`, lambda = damping times the mean of H0's diagonal, and Kronecker blocks where H0 has factors); or a baseline:
            "negation" (task arithmetic), "ewr", "fisher_negation".
        measured: what the removal was measured to cost, for the card.
        **options: as for `merge` (out, delta0, base_weight, dtype, ...).

    Returns:
        As `merge`. The report holds the clamped share overall and per tensor, the largest weight for given shares, and what moved.

    Raises:
        ValueError: as `merge`; also another method, a weight below 0, a task with another tokenizer than the base, a gradient that is
            not finite or zero, or steps that make no sense.
        TypeError: as `merge`; also a task that is none.

    Example:
        >>> import torch
        >>> base, toxic, cook = ({"w": torch.tensor([1.0, x])} for x in (1.0, 3.0, 1.0))
        >>> subtract(base, toxic, method="guarded", base_curvature=1.0, damping=1.0)["w"]  # lambda = 1: half of the task vector
        tensor([1., 0.])
    """
    choose("method", method, removals())
    added = tasks_of(add)
    check_steps(steps, gradient, method)
    running = {name: options.pop(name) for name in RUNNING if name in options}
    if running.get("out") is not None:
        check_absent(place(running["out"]), bool(running.get("overwrite")))
    if callable(gradient):
        gradient = relinearised(
            base, gradient, steps, weight=weight, base_curvature=base_curvature, **options
        )
    tasks = [scaled(one, weight) for one in tasks_of(task_of(base, task, gradient, method))]
    for one in (*tasks, *added):
        check_tokenizers(base, one.model)
    guarded = RULES[method].guarded
    own: dict[str, Any] = {"keep": keep, "guard": guard} if guarded else {}
    if added:
        tasks, method = both_signs(tasks, added, method), "signed"
    made = prepare(base, tasks, method=method, base_curvature=base_curvature, **own, **options)
    if guarded:
        limits = largest_alpha(made)
        made.told["largest_alpha"] = {
            s: limit if math.isinf(limit) else weight * limit for s, limit in limits.items()
        }
    removed = [one.name for one in made.inputs.tasks[: len(tasks) - len(added)]]
    made.told["removed"] = {"removed": removed, "weight": weight, "measured": dict(measured or {})}
    return execute(made, **running)


def both_signs(tasks: Sequence[Task], added: Sequence[Task], method: str) -> list[Task]:
    """What is taken away, with weights below 0 and without curvature, then what is added.

    Raises:
        ValueError: another method than "guarded", or a task to be added with a weight that is not above 0.
    """
    if method != "guarded":
        raise GradmatchError(
            f"tasks are added and taken away in one call by method='guarded', not by {method}",
            "bad_setting",
            "add",
        )
    for one in added:
        if not min(numbers(one.weight)) > 0:
            raise GradmatchError(
                f"the task {one.name or 'to add'!r} has the weight {one.weight}; what is added needs one above 0",
                "out_of_range",
                "add",
            )
    away = [replace(one, weight=times(one.weight, -1.0), curvature=None) for one in tasks]
    return [*away, *added]


def check_steps(steps: int, gradient: Any, method: str) -> None:
    """Refuse steps that nothing can take.

    Raises:
        ValueError: fewer than 1 or more than MOST_STEPS, or several without a function that takes the gradient anew.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise GradmatchError(
            f"steps is {steps!r}; it must be a whole number from 1 to {MOST_STEPS}", "out_of_range", "steps"
        )
    if steps > 1 and (method != "ascent" or not callable(gradient)):
        raise GradmatchError(
            f"steps is {steps}: only ascent takes several, with a function as gradient that is asked anew at each of them "
            "(`--remove FILE` on the command line)",
            "bad_setting",
            "steps",
        )


def relinearised(base: Model | Checkpoint, gradient: Gradient, steps: int, **options: Any) -> Curvature:
    """The mean of the gradients on the way of an ascent in so many steps, as a curvature with that gradient.

    H0 and lambda stay those of the base, so that all steps together are one step along this mean.

    Raises:
        ValueError: a gradient that is not finite, or zero everywhere.
    """
    import torch

    from gradmatch.estimators.curvature import Curvature

    known = open_checkpoint(base)
    weights: Mapping[str, Tensor] = {name: known[name].float() for name in known if known.spec(name).floating}
    total: dict[str, Tensor] = {}
    for step in range(1, steps + 1):
        found = {name: value.detach().float() for name, value in gradient(weights).items() if name in known}
        size = sum(float(value.double().square().sum()) for value in found.values())
        if not math.isfinite(size) or size == 0:
            raise GradmatchError(
                f"the gradient on what is to go is {'zero' if size == 0 else 'not finite'} at step {step} of {steps}: "
                + ("there is nothing to climb" if size == 0 else "lower the weight"),
                "bad_data",
                "gradient",
            )
        for name, value in found.items():
            total[name] = total[name] + value / steps if name in total else value / steps
        flat = {name: torch.zeros(()).expand(value.shape) for name, value in total.items()}
        mean = Curvature.from_dict(flat, 1, {"estimator": "gradient"}, gradient=total)
        if step < steps:
            weights = {**weights, **subtract(base, None, method="ascent", gradient=mean, **options)}
    return mean


def task_of(base: Any, task: Any, gradient: Any, method: str) -> Any:
    """What is to be removed: the task, or for "ascent" the base itself with the gradient.

    Raises:
        ValueError: neither or both, or the wrong one for the method.
    """
    if "gradient" not in RULES[method].needs:
        if gradient is not None:
            raise GradmatchError(
                f"gradient is of method='ascent'; {method} goes by a task's weights",
                "bad_setting",
                "gradient",
            )
        if task is None:
            raise GradmatchError(
                f"a task is needed: {method} removes what a fine-tuned model learned", "bad_tasks"
            )
        return task
    if (task is None) == (gradient is None):
        raise GradmatchError(
            f"{method} needs gradient=..., a curvature with the measured gradient at the base (`estimate(..., gradient=True)`)"
            if gradient is None
            else f"{method} takes a task or gradient=..., not both: a task would be the base again, with that curvature",
            "bad_tasks",
        )
    return Task(base, gradient, name="gradient") if task is None else task


def analogy(
    base: Model | Checkpoint,
    a: Model | Task,
    b: Model | Task,
    c: Model | Task,
    *,
    method: str = "task_arithmetic",
    weight: float = 1.0,
    **options: Any,
) -> Merged | Checkpoint:
    """a is to b as c is to the result: theta_c + weight * (theta_b - theta_a), by tau = tau_c + weight * (tau_b - tau_a).

    Args:
        base: what all three were fine-tuned from.
        a: the source without the wanted property.
        b: the source with it.
        c: where it is to be added.
        method: "task_arithmetic", or a curvature rule such as "gradient_matching" (a, b, c are then Tasks with curvatures;
            a enters with a negative weight).
        weight: of the difference.
        **options: as for `merge`.

    Returns:
        As `merge`.

    Raises:
        ValueError: as `merge`.
    """
    sign = {"a": -weight, "b": weight, "c": 1.0}
    tasks = []
    for letter, given in (("c", c), ("b", b), ("a", a)):
        one = given if isinstance(given, Task) else Task(given, name=letter)
        tasks.append(scaled(one, sign[letter], signed=True))
    return merge(base, tasks, method=method, **options)


def tasks_of(given: Model | Task | Iterable[Task]) -> list[Task]:
    """One or several tasks as a list; a bare model is a task without curvature.

    Raises:
        TypeError: anything else.
    """
    if isinstance(given, Task):
        return [given]
    if is_model(given):
        return [Task(given)]  # type: ignore[arg-type]
    tasks: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    for one in tasks:
        if not isinstance(one, Task):
            raise TypeError(
                f"what is removed is a Task(model, curvature), or a list of them, not {type(one).__name__}"
            )
    return tasks


def scaled(task: Task, factor: Any, *, signed: bool = False) -> Task:
    """The task with its weight times a factor.

    Raises:
        TypeError: a factor that is no number.
        ValueError: one that is not finite; unless `signed`, a factor or weight below 0.
    """
    factor = plain(factor)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(
            f"weight is {factor!r}; it must be a number (tasks' own weights may differ by tensor)"
        )
    if not math.isfinite(factor) or (not signed and (factor < 0 or any(v < 0 for v in numbers(task.weight)))):
        raise GradmatchError(
            f"weight is {factor} and the task's own {task.weight}; both must be finite, and at least 0 to subtract",
            "out_of_range",
            "weight",
        )
    return replace(task, weight=times(task.weight, factor))


def largest_alpha(made: Plan, shares: Sequence[float] = SHARES) -> dict[float, float]:
    """share -> the largest factor on all weights of a removal for which less than this share of them is clamped.

    A weight is clamped when H0 - alpha H_t < keep H0, that is when alpha > (1 - keep) H0 / sum_t w_t H_t: the answer is a
    quantile of that ratio. Read from the curvatures alone, to within 0.8 % on the safe side; inf where nothing would be.
    """
    import torch

    from gradmatch.engine.buffers import Buffers
    from gradmatch.engine.context import Context, pieces
    from gradmatch.engine.stacked import curvature_pair

    context, buffers = Context(made), Buffers()
    counts, total = torch.zeros(BINS, dtype=torch.int64), 0
    for step in made.steps:
        if not step.guarded:
            continue
        for first, last in pieces(step, 0, step.spec.numel):
            h0, h = curvature_pair(context, step, first, last, buffers)
            ratio = ((1 - step.options["keep"]) * h0 / h).float().clamp_(min=0)
            ratio[h <= 0] = math.inf  # a task that knows nothing, or a Hessian's negative entry, never clamps
            bits = ratio.view(torch.int32) >> 16
            counts += torch.bincount(bits, minlength=BINS)
            total += last - first
    below = counts.cumsum(0)
    limits = {}
    for share in shares:
        edge = int(torch.searchsorted(below, math.ceil(share * total)))  # the bin in which the quantile lies
        value = torch.tensor([edge << 16], dtype=torch.int32).view(torch.float32)
        limits[share] = float(value) if edge < BINS and math.isfinite(float(value)) else math.inf
    return limits
