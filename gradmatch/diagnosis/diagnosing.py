"""`diagnose`: gather what can be known about a merge, from files alone or with data, and rank what explains its failure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gradmatch.diagnosis.cause import Cause
from gradmatch.diagnosis.causes import find_causes
from gradmatch.diagnosis.evidence import Evidence
from gradmatch.diagnosis.measuring import measure, passes
from gradmatch.diagnosis.recipes import effective_weights, in_span, reach_of
from gradmatch.diagnosis.report import report_of
from gradmatch.diagnosis.scan import scan_weights
from gradmatch.diagnosis.source import PIECE
from gradmatch.diagnosis.text import describe
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.progress import shown
from gradmatch.estimators.shown import frame
from gradmatch.measure.forecast import Products
from gradmatch.measure.opening import (
    CurvatureLike,
    check_tasks,
    compared_curvatures,
    curvature_owners,
    linear_instead,
    open_models,
    open_objectives,
    planned_merge,
)
from gradmatch.measure.opening import module_of as module_of
from gradmatch.measure.products import load_products
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.curvatures import open_curvature
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Task
from gradmatch.models.units import compare_units
from gradmatch.models.views import like
from gradmatch.plan.request import POLICIES
from gradmatch.rules import find_rule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.measure.objective import Objective
    from gradmatch.measure.redundancy import RedundancyPoint
    from gradmatch.models.task import Model


@dataclass(repr=False)
class Diagnosis:
    """Why a merge is as it is: what was found, and the ways to show it.

    Attributes:
        causes: ranked; empty for a merge in which nothing was found.
        evidence: what they were found in.

    Example:
        >>> import torch, gradmatch
        >>> base = {"w": torch.ones(4, 4)}
        >>> gradmatch.diagnose(base, [gradmatch.Task({"w": torch.full((4, 4), float("nan"))}, name="a")], base)
        Diagnosis(1 cause: not_finite (a))
    """

    causes: list[Cause]
    evidence: Evidence

    @property
    def healthy(self) -> bool:
        """Whether no cause was found."""
        return not self.causes

    @property
    def notes(self) -> list[str]:
        """What else is to be said, and what could not be looked at."""
        return self.evidence.notes

    @property
    def redundancy(self) -> dict[str, list[RedundancyPoint]]:
        """Task -> its redundancy curve, loss in nats per example."""
        return self.evidence.redundancy

    @property
    def barriers(self) -> dict[tuple[str, str], float]:
        """(task, task) -> height of the loss between the two fine-tunes, nats per example of both."""
        return self.evidence.barriers

    @property
    def overlaps(self) -> dict[tuple[str, str], float]:
        """(task, task) -> overlap of their curvatures in [0, 1]."""
        return self.evidence.overlaps

    @property
    def weighted_conflicts(self) -> dict[tuple[str, str], float]:
        """(task, task) -> share of their curvature on weights that they moved in opposite directions."""
        return self.evidence.weighted_conflicts

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, see `gradmatch.diagnosis.report.report_of`."""
        return report_of(self.causes, self.evidence)

    def to_html(self) -> str:
        """One self-contained page: text, tables and drawings, no network."""
        from gradmatch.diagnosis.page import page

        return page(self.to_dict())

    def to_frame(self) -> Any:
        """The causes as a pandas DataFrame, one row each.

        Raises:
            ImportError: pandas is not installed.
        """
        columns = ["name", "subject", "cost", "source", "evidence", "remedy"]
        return frame([{c: getattr(cause, c) for c in columns} for cause in self.causes], columns)

    def __str__(self) -> str:
        return describe(self.to_dict())

    def __repr__(self) -> str:
        told = ", ".join(f"{cause.name} ({cause.subject})" for cause in self.causes[:4])
        count = f"{len(self.causes)} cause{'s' * (len(self.causes) > 1)}: {told}" if told else "nothing found"
        return f"Diagnosis({count}{', ...' * (len(self.causes) > 4)})"

    def _repr_html_(self) -> str:
        from gradmatch.diagnosis.page import summary

        return summary(self.to_dict())


def diagnose(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    merged: Model | Checkpoint | None = None,
    *,
    method: str | None = None,
    base_curvature: CurvatureLike | float | None = None,
    base_weight: float = 1.0,
    delta0: float = 1e-6,
    data: Mapping[str, Iterable[Any]] | None = None,
    num_examples: Mapping[str, int] | None = None,
    module: nn.Module | None = None,
    likelihood: str | Any = "auto",
    products: Sequence[Products] | str | os.PathLike[str] | None = None,
    forecast: bool = True,
    mismatch: bool = True,
    thorough: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> Diagnosis:
    """Explain a merge: rank what went wrong, with evidence, cost in nats, and remedy.

    Without data, what the weights and curvature files tell is told; with data, losses, mismatch and forecasts are measured
    and every cost is the loss that a repair saves.

    Args:
        base: theta0: path, hub id, state dict or module.
        tasks: the fine-tuned models, with curvatures and weights as they were merged.
        merged: the merge; None: it is made in memory with `method` and `options`.
        method: rule that made (or is to make) the merge; None: gradient_matching where all curvatures are given, else
            task_arithmetic.
        base_curvature: H0's curvature, or a number, as for `merge`.
        base_weight: factor on H0.
        delta0: the floor that the merge used.
        data: task -> batches with true labels; a few hundred examples a task suffice. Under "base", data of the base's own, to see
            what it forgets.
        num_examples: task (or "base") -> N its loss sums over; else its curvature's, else the number of examples given.
        module: structure to run the data through; not needed where `base` is a module or a transformers folder.
        likelihood: as `gradmatch.estimators.estimate` takes it.
        products: stored forecast products (file or list); measured from data where absent.
        forecast: measure products (T^2 forward-mode passes over the data).
        mismatch: measure the gradient mismatch (2 T backward passes over the data); no cause rests on it.
        thorough: also the path from the base, redundancy curves and barriers (about 10 more forward passes over all data).
        progress: say what it will read and run, and show a progress bar, on stderr; None: on a terminal or in a notebook, unless GRADMATCH_VERBOSITY is quiet.
        **options: of the rule, for a planned merge.

    Raises:
        ValueError: no task, a task called "base" or "merged", data of an unknown task, data without a module, an unknown method.
        TypeError: tasks that are no Tasks.
        FileNotFoundError: an input that is not there.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    opened_h0 = (
        open_curvature(base_curvature) if isinstance(base_curvature, str | os.PathLike) else base_curvature
    )
    theta0, models, weights, curvatures = open_models(base, tasks, data=bool(data), base_curvature=opened_h0)
    names = list(models)
    told = method is not None
    if method is None:
        complete = len(curvatures) == len(names) and opened_h0 is not None
        method = "gradient_matching" if complete else "task_arithmetic"
    find_rule(method)
    for reserved in ("base", "merged"):
        if reserved in names:
            raise GradmatchError(
                f"a task is called {reserved!r}, which is what the {reserved} model goes by here; give it another name",
                "bad_request",
            )
    check_tasks("data", data, [*names, "base"])
    check_tasks("num_examples", num_examples, [*names, "base"])
    alpha = effective_weights(method, weights, options)
    notes: list[str] = []
    given = {**curvatures, **({"base": opened_h0} if isinstance(opened_h0, Curvature) else {})}
    sizes = {**{t: c.num_examples for t, c in given.items()}, **(num_examples or {})}
    objectives = open_objectives(
        {task: data[task] for task in (*names, "base") if task in data} if data else {},
        sizes,
        base,
        theta0,
        module,
        likelihood,
    )  # before any weight is read: data that cannot be used is told at once
    refusal = ""
    if merged is None:
        opened = [
            replace(task, model=models[name], name=name) for name, task in zip(names, tasks, strict=True)
        ]
        made, refusal = planned_merge(theta0, opened, method, base_curvature, base_weight, delta0, options)
        theta = None if made is None else open_checkpoint(made)
        report = getattr(made, "report", None)
    else:
        theta = like(open_checkpoint(merged, base=theta0), theta0)
        report = getattr(merged, "report", None)
    base_objective = objectives.pop("base", None)
    progress = shown(progress)
    if progress:
        say_cost(
            [theta0, *models.values(), theta],
            [*objectives.values(), base_objective],
            passes(len(names), forecast, mismatch, thorough),
        )
    evidence = Evidence(
        base=theta0,
        tasks=dict(models),
        merged=theta,
        alpha=alpha,
        scan=scan_weights(theta0, models, theta, reach_of(method, alpha, options), progress=progress),
        method=method,
        refusal=refusal,
        policies={name: options[name] for name in POLICIES if name in options},
        exact=told and in_span(method, tasks, options),
        delta0=delta0,
        base_weight=base_weight,
        curvatures=curvatures,
        base_curvature=opened_h0,
        units=compare_units(given),
        objectives=objectives,
        base_objective=base_objective,
        fingerprints=curvature_owners(theta0, models, curvatures, opened_h0),
        notes=notes,
    )
    evidence.overlaps, evidence.weighted_conflicts = compared_curvatures(theta0, models, curvatures)
    notes += linear_instead(report, theta)
    if any(any(t.rank) and t.numel > PIECE for t in evidence.scan.tensors.values()):
        notes.append(
            "effective ranks of large matrices are estimates, by random vectors; what may have moved in them was compared on samples"
        )
    if isinstance(products, str | os.PathLike):
        evidence.products = load_products(products)
    elif products is not None:
        evidence.products = list(products)
    if evidence.products and set(evidence.products[0].directions) != set(names):
        notes.append(
            "the stored products are of another span than that of the task vectors: they were left out"
        )
        evidence.products = []
    if not objectives and base_objective is None:
        notes.append("no data: costs are not measured, only what files tell is told (pass data, or --data)")
    else:
        with tqdm(
            total=passes(len(names), forecast, mismatch, thorough),
            desc="losses",
            unit="pass",
            disable=not progress,
        ) as bar:
            measure(evidence, forecast, mismatch, thorough, bar.update)
        evidence.gradients.clear()  # as large as the models, and needed no more
    if not curvatures:
        notes.append(
            "no curvature: nothing is said of noise, floors and overlap (`gradmatch estimate` makes one)"
        )
    return Diagnosis(find_causes(evidence), evidence)


def say_cost(
    models: Sequence[Mapping[str, Tensor] | None], losses: Sequence[Objective | None], runs: int
) -> None:
    """Print what is read and run, before it starts."""
    read = [model for model in models if model is not None]
    size = sum(
        spec.nbytes for model in read if isinstance(model, Checkpoint) for spec in map(model.spec, model)
    )
    seen = sum(loss.seen for loss in losses if loss is not None)
    text = f"reading {len(read)} models" + (f" ({size / 1e9:.2g} GB)" if size else "")
    if seen:
        text += f", then about {runs} forward passes over {seen} examples, and one or two for each cause that is suspected"
    print(text, file=sys.stderr)
