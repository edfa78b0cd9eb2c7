"""`diagnose`: gather what can be known about a merge, from files alone or with data, and rank what explains its failure."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from estimators.curvature import Curvature, fingerprint
from gradmatch.checkpoint import Checkpoint, open_checkpoint
from gradmatch.diagnosis import health
from gradmatch.diagnosis.barrier import POINTS, barrier_height
from gradmatch.diagnosis.causes import Cause, find_causes
from gradmatch.diagnosis.conflict import curvature_overlap
from gradmatch.diagnosis.evidence import Evidence
from gradmatch.diagnosis.forecast import Products
from gradmatch.diagnosis.mismatch import gradient_mismatch
from gradmatch.diagnosis.objective import Objective
from gradmatch.diagnosis.products import (
    load_products,
    measure_products,
    stored_gradient,
    task_vector,
)
from gradmatch.diagnosis.redundancy import RedundancyPoint, redundancy_curve
from gradmatch.diagnosis.scan import scan_weights
from gradmatch.inputs import task_names
from gradmatch.rules import RULES
from gradmatch.settings import numbers
from gradmatch.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.task import Model

CurvatureLike = Curvature | str | os.PathLike[str]
DROPS = (0.0, 0.5, 0.9, 0.99)


@dataclass
class Diagnosis:
    """Why a merge is as it is.

    Attributes:
        causes: ranked; empty for a merge in which nothing was found.
        evidence: what they were found in.
        redundancy: task -> its redundancy curve, loss in nats per example.
        barriers: (task, task) -> height of the loss between the two fine-tunes, nats per example of both.
        overlaps: (task, task) -> overlap of their curvatures in [0, 1].
    """

    causes: list[Cause]
    evidence: Evidence
    redundancy: dict[str, list[RedundancyPoint]] = field(default_factory=dict)
    barriers: dict[tuple[str, str], float] = field(default_factory=dict)
    overlaps: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether no cause was found."""
        return not self.causes

    @property
    def notes(self) -> list[str]:
        """What else is to be said, and what could not be looked at."""
        return self.evidence.notes

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, in the form of `gradmatch.diagnosis.report.Report`."""
        from gradmatch.diagnosis.report import report_of

        content: dict[str, Any] = json.loads(report_of(self).model_dump_json())  # writes infinity as text
        return content

    def to_html(self) -> str:
        """One self-contained page: text, tables and drawings, no network."""
        from gradmatch.diagnosis.page import page
        from gradmatch.diagnosis.report import report_of

        return page(report_of(self))

    def to_frame(self) -> Any:
        """The causes as a pandas DataFrame, one row each.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                "to_frame needs pandas: pip install pandas; to_dict works without it"
            ) from error
        columns = ["name", "subject", "cost", "source", "evidence", "remedy"]
        return pd.DataFrame(
            [{c: getattr(cause, c) for c in columns} for cause in self.causes], columns=columns
        )

    def __str__(self) -> str:
        from gradmatch.diagnosis.text import describe

        return describe(self)


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
    thorough: bool = True,
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
        data: task -> batches with true labels; a few hundred examples a task suffice.
        num_examples: task -> N its loss sums over; else its curvature's, else the number of examples given.
        module: structure to run the data through; not needed where `base` is a module or a transformers folder.
        likelihood: as `estimators.estimate` takes it.
        products: stored forecast products (file or list); measured from data where absent.
        forecast: measure products (T^2 forward-mode passes over the data).
        thorough: also the path from the base, redundancy curves and barriers (about 10 T more forward passes).
        **options: of the rule, for a planned merge.

    Raises:
        ValueError: no task, data of an unknown task, data without a module, an unknown method.
        TypeError: tasks that are no Tasks.
        FileNotFoundError: an input that is not there.
    """
    theta0, models, weights, curvatures = _open(base, tasks)
    names = list(models)
    opened_h0 = (
        _open_curvature(base_curvature) if isinstance(base_curvature, str | os.PathLike) else base_curvature
    )
    if method is None:
        complete = len(curvatures) == len(names) and opened_h0 is not None
        method = "gradient_matching" if complete else "task_arithmetic"
    if method not in RULES:
        close = difflib.get_close_matches(method, RULES, 1)
        raise ValueError(f"unknown method {method!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    _check_tasks("data", data, names)
    _check_tasks("num_examples", num_examples, names)
    alpha = effective_weights(method, weights, options)
    notes: list[str] = []
    theta: Mapping[str, Tensor] | None
    if merged is None:
        theta = _planned(base, tasks, method, base_curvature, base_weight, delta0, options, notes)
    else:
        theta = open_checkpoint(merged, base=theta0)
    evidence = Evidence(
        base=theta0,
        tasks=dict(models),
        merged=theta,
        alpha=alpha,
        scan=scan_weights(theta0, models, theta, [alpha[name] for name in names]),
        method=method,
        delta0=delta0,
        base_weight=base_weight,
        curvatures=curvatures,
        base_curvature=opened_h0,
        fingerprints=_fingerprints(theta0, models, curvatures, opened_h0),
        notes=notes,
    )
    result = Diagnosis([], evidence)
    result.overlaps = _overlaps(curvatures)
    if isinstance(products, str | os.PathLike):
        evidence.products = load_products(products)
    elif products is not None:
        evidence.products = list(products)
    if data is None:
        notes.append("no data: costs are not measured, only what files tell is told (pass data, or --data)")
    else:
        structure = module or module_of(base, theta0)
        sizes = {**{t: c.num_examples for t, c in curvatures.items()}, **(num_examples or {})}
        for task in names:
            if task in data:
                evidence.objectives[task] = Objective(structure, data[task], sizes.get(task), likelihood)
        _measure(result, forecast, thorough)
    if not curvatures:
        notes.append(
            "no curvature: nothing is said of noise, floors and overlap (`gradmatch estimate` makes one)"
        )
    notes += worse_than_base(evidence)
    result.causes = find_causes(evidence)
    return result


def worse_than_base(evidence: Evidence) -> list[str]:
    """Tasks whose loss at the merge is above the base's by more than two standard errors of the difference."""
    found = []
    for task, merged in evidence.losses.get("merged", {}).items():
        difference = merged - evidence.losses["base"][task]
        error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        if float(difference.mean()) > 2 * error:
            found.append(
                f"{task!r} is worse off than at the base: {float(merged.mean()):.3f} against "
                f"{float(evidence.losses['base'][task].mean()):.3f} nats per example"
            )
    return found


def effective_weights(
    method: str, weights: Mapping[str, float], options: Mapping[str, Any]
) -> dict[str, float]:
    """alpha_t as the rule uses them: 1/T for averaging, normalised for weighted averages, times `scale` where it has one."""
    if method in ("averaging", "greedy_soup", "model_stock"):
        return dict.fromkeys(weights, 1 / len(weights))
    if method in ("weighted", "linear") and options.get("normalize", True):
        total = sum(weights.values()) or 1.0
        return {task: weight / total for task, weight in weights.items()}
    return {task: weight * float(options.get("scale", 1.0)) for task, weight in weights.items()}


def _measure(result: Diagnosis, forecast: bool, thorough: bool) -> None:
    """Losses, mismatch, products, paths: everything that needs data."""
    evidence = result.evidence
    broken = {model for model, found in evidence.scan.nonfinite.items() if found}
    broken |= {model for model, shapes in evidence.scan.shapes.items() if shapes}
    if "base" in broken or broken & set(evidence.tasks):
        evidence.notes.append(f"losses were not measured: {', '.join(sorted(broken))} cannot be run")
        return
    models: dict[str, Mapping[str, Tensor]] = {"base": evidence.base, **evidence.tasks}
    if evidence.merged is not None and "merged" not in broken:
        models["merged"] = evidence.merged
    for model, weights in models.items():
        evidence.losses[model] = {}
        for task, objective in evidence.objectives.items():
            evidence.losses[model][task], confusion = objective.evaluate(weights)
            if confusion is not None:
                evidence.confusions.setdefault(model, {})[task] = confusion
    evidence.uniform = {task: objective.uniform_loss() for task, objective in evidence.objectives.items()}
    overflowing = [model for model, found in evidence.losses.items() if not _finite(found)]
    if set(overflowing) - {"merged"}:
        evidence.notes.append(f"outputs of {', '.join(overflowing)} are not finite: nothing was forecast")
        return
    complete = set(evidence.objectives) == set(evidence.tasks)
    if forecast and complete and not evidence.products:
        directions = {task: task_vector(evidence.base, model) for task, model in evidence.tasks.items()}
        evidence.products = [
            measure_products(
                task,
                objective,
                evidence.tasks[task],
                directions,
                {task: 1.0},
                gradient=_gradient_of(evidence, task),
            )
            for task, objective in evidence.objectives.items()
        ]
    if not evidence.measured or evidence.merged is None:
        return
    if overflowing:
        evidence.notes.append("the merge's outputs are not finite: no mismatch was measured")
    elif complete:
        measure_mismatch(evidence)
    _measure_batchnorm(evidence)
    for share in POINTS[1:-1] if thorough else (0.5,):
        at = evidence.measure(evidence.along_path(share))
        evidence.path[share] = {task: float(losses.mean()) for task, losses in at.items()}
    for share, model in ((0.0, "base"), (1.0, "merged")):
        evidence.path[share] = {t: float(losses.mean()) for t, losses in evidence.losses[model].items()}
    if thorough:
        _measure_redundancy(result)
        _measure_barriers(result)


def _finite(losses: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(values).all()) for values in losses.values())


def measure_mismatch(evidence: Evidence) -> None:
    """Gradient mismatch at the merge, with the base's curvature as preconditioner where there is one."""
    h0: dict[str, Tensor] | float = 1.0
    delta0 = 0.0
    base = evidence.base_curvature
    if isinstance(base, int | float):
        h0 = float(base) * evidence.base_weight
    elif base is not None:
        h0 = {name: base.total(name) * evidence.base_weight for name in base}
    if base is not None:
        delta0 = max(evidence.delta0, 1e-12)
    stored = {task: found for task in evidence.objectives if (found := _gradient_of(evidence, task))}
    assert evidence.merged is not None
    evidence.mismatch = gradient_mismatch(
        evidence.merged,
        evidence.tasks,
        lambda task, weights: evidence.objectives[task].gradient(weights),
        evidence.alpha,
        {task: objective.num_examples for task, objective in evidence.objectives.items()},
        stored=stored,
        h0=h0,
        delta0=delta0,
    )


def _gradient_of(evidence: Evidence, task: str) -> dict[str, Tensor] | None:
    """The stored gradient of a task where its curvature is its own and covers every parameter of the module."""
    curvature = evidence.curvatures.get(task)
    if curvature is None or not curvature.has_gradient or evidence.fingerprints.get(task, task) != task:
        return None
    gradient = stored_gradient(curvature)
    needed = {name for name, _ in evidence.objectives[task].module.named_parameters()}
    return gradient if needed <= set(gradient) else None


def _measure_batchnorm(evidence: Evidence) -> None:
    """Statistics of the merge's activations over all tasks' data, and how far the stored ones are off."""
    assert evidence.merged is not None
    module = next(iter(evidence.objectives.values())).module
    if not any(isinstance(layer, health.BATCH_NORMS) for layer in module.modules()):
        return
    runs = [(batch.args, batch.kwargs) for o in evidence.objectives.values() for batch in o.batches]
    evidence.batchnorm_repair = health.batchnorm_statistics(module, evidence.merged, runs)
    evidence.batchnorm = health.batchnorm_shift(evidence.merged, evidence.batchnorm_repair)


def _measure_redundancy(result: Diagnosis) -> None:
    evidence = result.evidence
    for task, objective in evidence.objectives.items():
        tau = {
            name: value
            for name, value in task_vector(evidence.base, evidence.tasks[task]).items()
            if name in evidence.scan.tensors
        }

        def score(weights: Mapping[str, Tensor], o: Objective = objective, t: str = task) -> float:
            return float(o.losses({**evidence.tasks[t], **weights}).mean())

        result.redundancy[task] = redundancy_curve(evidence.base, tau, score, DROPS)


def _measure_barriers(result: Diagnosis) -> None:
    """Half-way between each two fine-tunes, the mean loss of both tasks against the mean of the ends."""
    evidence = result.evidence
    for a, b in combinations(evidence.objectives, 2):
        middle = evidence.at_coefficients({a: 0.5, b: 0.5})
        ends = [sum(float(evidence.losses[m][t].mean()) for t in (a, b)) / 2 for m in (a, b)]
        half = sum(float(evidence.objectives[t].losses(middle).mean()) for t in (a, b)) / 2
        result.barriers[a, b] = barrier_height([(0.0, ends[0]), (0.5, half), (1.0, ends[1])])


def _open(
    base: Model | Checkpoint, tasks: Sequence[Task]
) -> tuple[Checkpoint, dict[str, Checkpoint], dict[str, float], dict[str, Curvature]]:
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not tasks:
        raise ValueError("no tasks: a diagnosis needs the base and at least one fine-tuned model")
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(
                f"tasks must be Task objects, got {type(task).__name__}; write Task(model, curvature, weight)"
            )
    theta0 = open_checkpoint(base)
    models: dict[str, Checkpoint] = {}
    weights: dict[str, float] = {}
    curvatures: dict[str, Curvature] = {}
    for name, task in zip(task_names(tasks), tasks, strict=True):
        models[name] = open_checkpoint(task.model, base=theta0)
        found = numbers(task.weight)
        weights[name] = sum(found) / len(found)
        if task.curvature is not None:
            curvatures[name] = _open_curvature(task.curvature)
    return theta0, models, weights, curvatures


def _open_curvature(given: CurvatureLike) -> Curvature:
    return given if isinstance(given, Curvature) else Curvature.load(given)


def _check_tasks(what: str, given: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    for task in given or {}:
        if task not in names:
            close = difflib.get_close_matches(task, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the tasks are {', '.join(names)}"
            raise ValueError(f"{what} names a task {task!r} that is not merged; {hint}")


def _planned(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    method: str,
    base_curvature: CurvatureLike | float | None,
    base_weight: float,
    delta0: float,
    options: Mapping[str, Any],
    notes: list[str],
) -> Mapping[str, Tensor] | None:
    """The merge as it would come out, in memory; None, with a note, where `merge` refuses."""
    import warnings

    from gradmatch.merging import merge

    arguments: dict[str, Any] = {
        "base_curvature": base_curvature,
        "base_weight": base_weight,
        "delta0": delta0,
        "allow_mismatch": True,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return merge(base, tasks, method=method, **arguments)
        except ValueError as error:
            notes.append(f"the merge itself was refused: {error}")
            return None


def _fingerprints(
    base: Checkpoint,
    models: Mapping[str, Checkpoint],
    curvatures: Mapping[str, Curvature],
    base_curvature: Curvature | float | None,
) -> dict[str, str]:
    """Whose curvature -> the model that it was taken at, "" for none of these; curvatures without a fingerprint pass."""
    found: dict[str, str] = {}
    everyone = {"base": base, **models}
    given: dict[str, Curvature] = dict(curvatures)
    if isinstance(base_curvature, Curvature):
        given["base"] = base_curvature
    for whose, curvature in given.items():
        stored = curvature.info.get("fingerprint")
        if stored is None:
            continue
        order = [whose, *(model for model in everyone if model != whose)]
        found[whose] = next((m for m in order if _print_of(everyone[m], curvature) == stored), "")
    return found


def _print_of(model: Checkpoint, curvature: Curvature) -> str | None:
    try:
        return fingerprint(curvature, model.sample)
    except KeyError:
        return None


def _overlaps(curvatures: Mapping[str, Curvature]) -> dict[tuple[str, str], float]:
    overlaps = {}
    for a, b in combinations(curvatures, 2):
        both = s = t = 0.0
        for name in curvatures[a]:
            if name in curvatures[b]:
                part = curvature_overlap(curvatures[a].mean(name), curvatures[b].mean(name))
                both, s, t = both + part[0], s + part[1], t + part[2]
        overlaps[a, b] = both / (s * t) ** 0.5 if s * t > 0 else 0.0
    return overlaps


def module_of(base: Model | Checkpoint, opened: Checkpoint) -> nn.Module:
    """The structure to run data through: the base where it is a module, else what its config.json describes.

    Raises:
        ValueError: neither.
    """
    if isinstance(base, torch.nn.Module):
        return base
    if isinstance(opened.module, torch.nn.Module):
        return opened.module
    architectures = (opened.config or {}).get("architectures") or []
    if opened.path is None or not architectures:
        raise ValueError(
            "data needs a module to run through: pass module=, or a base that is a module or a folder with a config.json"
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(opened.path)
    architecture = getattr(transformers, architectures[0], None)
    if architecture is None:
        raise ValueError(
            f"{opened.path} wants the architecture {architectures[0]!r}, which transformers lacks; pass module="
        )
    module: nn.Module = architecture(config)
    return module
