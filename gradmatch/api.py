"""The public call: merge, with weights that are given or chosen, and greedy soups."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradmatch import merging
from gradmatch.rules import Linear, find_rule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.estimators.curvature import Curvature
    from gradmatch.merging import CurvatureLike
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
    progress: bool = False,
    weights: str | None = None,
    data: Mapping[str, Any] | None = None,
    products: Any = None,
    **options: Any,
) -> Mapping[str, Tensor]:
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
        progress: show a progress bar.
        weights: "auto" chooses every task's weight by forecast (task_arithmetic and gradient_matching), from `data` or `products`.
        data: task -> batches of examples with true labels, for weights="auto"; the models are then run, and held in memory.
        products: in place of data: the file that `gradmatch forecast --save` wrote.
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
        **options,
    }
    if weights is not None or data is not None or products is not None:
        return _chosen(base, tasks, weights, data, products, method=method, **settings)
    rule = find_rule(method)
    if isinstance(rule, Linear) and rule.searches:
        from gradmatch.choosing.soup import greedy_soup

        return greedy_soup(base, tasks, **settings)
    return merging.merge(base, tasks, method=method, **settings)


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
    progress: bool,
    **options: Any,
) -> Mapping[str, Tensor]:
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
    return merging.execute(made, out, overwrite=overwrite, batches=batches, progress=progress)


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
