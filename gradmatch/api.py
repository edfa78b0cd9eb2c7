"""The public calls that meet several wings: merge with weights that are given or chosen, estimate from paths, forecast."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch import merging
from gradmatch.rules import Linear, find_rule

if TYPE_CHECKING:
    from torch import nn

    from gradmatch.choosing.auto import AutoWeights
    from gradmatch.estimators.curvature import Curvature
    from gradmatch.merging import CurvatureLike, Merged
    from gradmatch.models.checkpoint import Checkpoint
    from gradmatch.models.task import Model, Task


def merge(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    *,
    method: str = "gradient_matching",
    base_curvature: CurvatureLike | float | None = None,
    base_weight: float = 1.0,
    delta0: float = 1e-6,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    allow_mismatch: bool = False,
    allow_pickle: bool = False,
    batches: Any = None,
    progress: bool | None = None,
    posterior: bool = False,
    weights: str | None = None,
    data: Mapping[str, Any] | None = None,
    products: Any = None,
    align: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Merged | Checkpoint:
    """Merge fine-tuned models of one base.

    Args:
        base: path, hub id, state dict or module that the tasks were fine-tuned from.
        tasks: the fine-tuned models with their curvatures and weights.
        method: a name of `RULES`, or "package.module:NAME" of a rule of one's own (`gradmatch/rules/README.md`).
        base_curvature: H0's curvature (file or object), or a number for an isotropic one.
        base_weight: H0 = base_weight * N0 F0 + delta0.
        delta0: floor in nats per squared unit of weight; where nothing else is known the merge is task arithmetic.
        out: a folder to stream to; without it the result stays in memory.
        overwrite: replace `out` where it exists.
        allow_mismatch: accept curvatures whose fingerprint is another model's.
        allow_pickle: read .bin / .pt checkpoints (with weights_only).
        batches: for batchnorm="recalibrate": what the model is run on; it is then held in memory once.
        progress: show a progress bar; None: on a terminal or in a notebook, unless GRADMATCH_VERBOSITY is quiet.
        posterior: write the sum of the precisions, a curvature of the merged weights, beside them in `out` (posterior.safetensors).
        weights: "auto" chooses every task's weight by forecast (task_arithmetic and gradient_matching), from `data` or `products`.
        data: task -> batches of examples with true labels, for weights="auto"; the models are then run, and held in memory.
        products: in place of data: the file that `gradmatch forecast --save` wrote.
        align: for tasks of another beginning than the base's: a method of `gradmatch.rebasin.align`, or {"method": ..., "data": FILE
            or batches, ...}; every task is aligned to the base first, and its curvature with it.
        **options: of the rule and its transforms, and the policies of `gradmatch.plan.request.Request` (transforms, dtype, heads,
            missing, missing_curvature, batchnorm, embeddings, precision, rounding, shard_bytes, device, ...).

    Returns:
        The merged tensors in the base's dtypes, in memory or as an opened Checkpoint; both carry `.report`.

    Raises:
        ValueError: models, curvatures, weights or options that do not fit; NaN or Inf in an input.
        TypeError: arguments of another kind.
        FileNotFoundError: an input that is not there.
        FileExistsError: `out` exists.
        BlockingIOError: another process is writing `out`.
        OSError: no space left.
    """
    if align is not None:
        tasks, told = aligned(base, tasks, align)
        options["notes"] = [*options.get("notes", ()), *told]
    settings: dict[str, Any] = {
        "base_curvature": base_curvature,
        "base_weight": base_weight,
        "delta0": delta0,
        "out": out,
        "overwrite": overwrite,
        "allow_mismatch": allow_mismatch,
        "allow_pickle": allow_pickle,
        "batches": batches,
        "progress": progress,
        **({"posterior": True} if posterior else {}),
        **options,
    }
    if weights is not None or data is not None or products is not None:
        return _chosen(base, tasks, weights, data, products, method=method, **settings)
    rule = find_rule(method)
    if isinstance(rule, Linear) and rule.searches:
        from gradmatch.zoo.soup import greedy_soup

        found: Any = greedy_soup(base, tasks, **settings)
        return found  # type: ignore[no-any-return]
    return merging.merge(base, tasks, method=method, **settings)


def aligned(
    base: Model | Checkpoint, tasks: Sequence[Task], align: str | Mapping[str, Any]
) -> tuple[list[Task], list[str]]:
    """Tasks of other beginnings in the base's order of units, and what to note of it; a task that is the base itself stays.

    Args:
        base: whose order they get.
        tasks: to be aligned.
        align: a method, or its arguments by name; `data` may be a file, read with the base's tokenizer.

    Raises:
        ValueError: see `gradmatch.rebasin.align`.

    >>> aligned("base", [Task("other")], "weights")[0]                                       # doctest: +SKIP
    [Task(model=Checkpoint(other, 105 tensors), curvature=None, weight=1.0, name='other', options={})]
    """
    from dataclasses import replace

    from gradmatch.common.kinds import plain
    from gradmatch.models.opening import open_checkpoint
    from gradmatch.models.task import Task
    from gradmatch.plan.opened import task_names
    from gradmatch.rebasin.aligning import align as align_to

    given = {"method": align} if isinstance(align, str) else dict(plain(align))
    if isinstance(given.get("data"), (str, os.PathLike)):
        from gradmatch.measure.data import read

        given["data"] = list(read(given["data"], base, limit=256, max_length=128))
    theta0 = open_checkpoint(base)
    moved, told = [], []
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    for name, task in zip(task_names(tasks), tasks, strict=True):
        own = open_checkpoint(task.model, base=theta0)
        if own is theta0 or task.model is base or (own.path is not None and own.path == theta0.path):
            moved.append(task)
            continue
        view = align_to(task.model if own.path is None else own, theta0, **given)
        told += [f"{name}: {line}" for line in view.report.summary().splitlines()]
        moved.append(replace(task, model=view, name=name))
    return moved, told


def _chosen(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    weights: str | None,
    data: Mapping[str, Any] | None,
    products: Any,
    *,
    out: str | os.PathLike[str] | None,
    overwrite: bool,
    batches: Any,
    progress: bool | None,
    posterior: bool = False,
    **options: Any,
) -> Merged | Checkpoint:
    """`merge` with weights that the forecast chooses; everything is checked before anything is measured."""
    from gradmatch.choosing.choose import SETTINGS, check_choice, choose_weights
    from gradmatch.models.task import Task
    from gradmatch.output.publishing import check_absent, place

    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    check_choice(weights=weights, tasks=tasks, data=data, products=products, **options)
    merging.prepare(base, tasks, **options)
    if out is not None:
        check_absent(place(out), overwrite)
    own = {name: options[name] for name in SETTINGS}
    choice = choose_weights(base, tasks, data=data, products=products, **own)
    options |= choice.options | {"notes": [*options.get("notes", ()), *choice.notes]}
    made = merging.prepare(base, choice.tasks, **options)
    made.told["forecast"] = choice.forecast
    return merging.execute(
        made, out, overwrite=overwrite, batches=batches, progress=progress, posterior=posterior
    )


def estimate(model: str | os.PathLike[str] | nn.Module, batches: Any, **options: Any) -> Curvature:
    """Curvature of a model from data, to merge with: `gradmatch.estimators.estimate`, which takes paths here as `merge` does.

    Args:
        model: an nn.Module; or a folder, a hub id or an adapter's folder, which is loaded with its own weights in float32.
        batches: as `gradmatch.estimators.estimate` takes them; or a file of texts, a folder or a hub set, read by
            `gradmatch.measure.data.read`: num_examples is then the number of its rows.
        **options: method, samples, num_examples and all others of `gradmatch.estimators.estimate`.

    Returns:
        A Curvature: per-example means by parameter name, with num_examples; `save` writes it.

    Raises:
        ValueError: weights that leave a parameter of the module without a value; otherwise as these two functions.
        FileNotFoundError: no such model or data.

    >>> estimate("amazon", "amazon.csv", method="fisher").save("amazon.safetensors")       # doctest: +SKIP
    """
    from gradmatch.estimators.estimation import estimate as measure
    from gradmatch.measure.data import read
    from gradmatch.measure.opening import module_of
    from gradmatch.models.opening import open_checkpoint

    if isinstance(batches, (str, os.PathLike)):
        batches = read(batches, model)
        options = {"num_examples": getattr(batches, "rows", None), **options}
    if isinstance(model, (str, os.PathLike)):
        model = module_of(model, open_checkpoint(model))
    return measure(model, batches, **options)


def forecast(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    *,
    data: Mapping[str, Any] | None = None,
    products: str | os.PathLike[str] | None = None,
    base_curvature: CurvatureLike | float | None = None,
    base_weight: float = 1.0,
    delta0: float = 1e-6,
    span: str = "tau",
    groups: Sequence[str] = (),
    lower: float = 0.0,
    upper: float = 2.0,
    save: str | os.PathLike[str] | None = None,
) -> AutoWeights:
    """What a merge will cost each task, and the weights that cost least, before anything is merged.

    The forecast is exact in curvature (products with the GGN over the examples) and quadratic in the weights.

    Args:
        base: path, hub id, state dict or module that the tasks were fine-tuned from.
        tasks: the fine-tuned models; their own weights play no role.
        data: task -> batches of examples with true labels; the models are run, and held in memory.
        products: in place of data: the file that `save` wrote. With neither, curvature files, which rank but do not forecast.
        base_curvature: as for `merge`; it and the next two matter for the preconditioned span.
        base_weight: as for `merge`.
        delta0: as for `merge`.
        span: "tau": weights of the task vectors; "preconditioned": of the terms of Eq. 12.
        groups: layer groups with weights of their own.
        lower: smallest weight.
        upper: largest weight.
        save: a file for the products, from which other weights are chosen later without data.

    Returns:
        `.weights` by task; `.best.rises`, by task the forecast rise of its summed loss over its own fine-tune, in nats;
        `.best.trusted`, whether the quadratic can hold so far out.

    Raises:
        ValueError: nothing to forecast from, or products of other weights, directions or settings.
        FileNotFoundError: an input that is not there.

    >>> forecast("base", [Task("a"), Task("b")], data={"a": a, "b": b}).weights               # doctest: +SKIP
    {'a': 0.62, 'b': 0.41}
    """
    from gradmatch.choosing.auto import auto_weights, forecast_objectives
    from gradmatch.choosing.choose import fingerprints, settings_of
    from gradmatch.measure.opening import check_tasks, module_of, open_models
    from gradmatch.measure.products import load_products, save_products
    from gradmatch.models.curvatures import open_curvature

    h0 = open_curvature(base_curvature) if isinstance(base_curvature, (str, os.PathLike)) else base_curvature
    theta0, models, _, curvatures = open_models(base, tasks, data=bool(data), base_curvature=h0)
    prints, settings = fingerprints(theta0, models), settings_of(span, base_weight, delta0)
    check_tasks("data", data, list(models))
    sizes = {name: curvature.num_examples for name, curvature in curvatures.items()}
    result = auto_weights(
        theta0,
        dict(models),
        forecast_objectives(module_of(theta0, theta0), data, sizes) if data else None,
        products=load_products(products, prints, settings) if products else None,
        curvatures=curvatures or None,
        base_curvature=h0,
        span=span,
        groups=groups,
        curvature_weight=base_weight,
        delta0=delta0,
        lower=lower,
        upper=upper,
    )
    if save is not None:
        save_products(result.products, save, prints, settings)
    return result
