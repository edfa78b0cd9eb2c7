"""The public calls: merge, subtract, analogy. Everything is planned and checked before the first value is read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from gradmatch.checkpoint import Checkpoint, open_checkpoint
from gradmatch.inputs.opened import open_inputs
from gradmatch.output.report import Report, make_report
from gradmatch.plan.plan import Plan, plan
from gradmatch.plan.request import Request
from gradmatch.task import Model, Task

if TYPE_CHECKING:
    from torch import Tensor

    from estimators.curvature import Curvature

CurvatureLike = Union["Curvature", str, "os.PathLike[str]"]
REQUEST_FIELDS = tuple(name for name in Request.__dataclass_fields__ if name != "options")


class Merged(dict[str, "Tensor"]):
    """A merged state dict, with the report of the merge."""

    report: Report


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
        method: a name of `RULES`.
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
            missing, missing_curvature, batchnorm, embeddings, precision, rounding, form, shard_bytes, ...).

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
    if weights is not None or data is not None or products is not None:
        from gradmatch.diagnosis.choosing import merge_auto

        return merge_auto(
            base, tasks, weights, data, products, method=method, base_curvature=base_curvature, base_weight=base_weight,
            delta0=delta0, out=out, overwrite=overwrite, allow_mismatch=allow_mismatch, allow_pickle=allow_pickle,
            batches=batches, progress=progress, **options,
        )  # fmt: skip
    if method == "greedy_soup":
        from gradmatch.soup import greedy_soup

        return greedy_soup(
            merge, base, tasks, out=out, overwrite=overwrite, batches=batches, progress=progress,
            base_curvature=base_curvature, base_weight=base_weight, delta0=delta0, allow_mismatch=allow_mismatch,
            allow_pickle=allow_pickle, **options,
        )  # fmt: skip
    made = prepare(
        base,
        tasks,
        method=method,
        base_curvature=base_curvature,
        base_weight=base_weight,
        delta0=delta0,
        allow_mismatch=allow_mismatch,
        allow_pickle=allow_pickle,
        **options,
    )
    if made.request.batchnorm == "recalibrate":
        from gradmatch.output.batchnorm import check_batches

        check_batches(made.inputs.base, batches)
    return execute(made, out, overwrite=overwrite, batches=batches, progress=progress)


def prepare(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    *,
    base_curvature: CurvatureLike | float | None = None,
    allow_mismatch: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> Plan:
    """The complete check of a merge from headers, and its plan; nothing is computed. Arguments and errors as in `merge`."""
    settings = {key: options.pop(key) for key in REQUEST_FIELDS if key in options}
    request = Request(options=options, **settings)
    inputs = open_inputs(
        base,
        tasks,
        request,
        base_curvature=base_curvature,
        allow_mismatch=allow_mismatch,
        allow_pickle=allow_pickle,
    )
    from gradmatch.inputs.vocab import align

    files = align(inputs, request.embeddings)
    made = plan(inputs, request)
    made.files = files
    if request.form == "delta":
        from gradmatch.output.delta import as_delta

        as_delta(made)
    elif inputs.base.path and inputs.base.path.is_dir():
        from gradmatch.output.layout import module_notes

        made.notes += module_notes(inputs.base.path)
    return made


def execute(
    made: Plan,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    batches: Any = None,
    progress: bool = False,
) -> Mapping[str, Tensor]:
    """Carry out a plan; see `merge`."""
    if out is None:
        if made.request.form == "delta":
            raise ValueError(
                "form='delta' is a form of files: pass out (in memory the result is exact as it is)"
            )
        return _in_memory(made, batches, progress)
    return _to_folder(made, Path(out), overwrite, batches, progress)


def _in_memory(made: Plan, batches: Any, progress: bool) -> Merged:
    """The result as a dict; tied names share one tensor."""
    from gradmatch.engine.loop import MemorySink
    from gradmatch.engine.stream import stream

    sink = MemorySink(made)
    with _bar(made, progress, ()) as on_progress:
        stats = stream(made, sink, {}, on_progress)
    aliases = made.inputs.base.aliases
    names = [name for name in made.inputs.base if aliases.get(name, name) in sink.tensors]
    merged = Merged((name, sink.tensors[aliases.get(name, name)]) for name in names)
    merged.update((step.name, sink.tensors[step.name]) for step in made.steps if step.name not in merged)
    if made.request.batchnorm == "recalibrate":
        from gradmatch.output.batchnorm import recalibrate

        merged.update(recalibrate(made.inputs.base, merged, batches))
    merged.report = make_report(made, stats)
    merged.report.heads = task_heads(made)
    return merged


def _to_folder(made: Plan, out: Path, overwrite: bool, batches: Any, progress: bool) -> Checkpoint:
    """The result as a folder that appears whole."""
    from gradmatch.engine.stream import stream
    from gradmatch.inputs.sources import identity
    from gradmatch.output.card import card_files
    from gradmatch.output.verify import verify, written
    from gradmatch.output.writer import FolderSink

    sink = FolderSink(out, made, identity(made), overwrite=overwrite)
    out = sink.out
    try:
        with _bar(made, progress, sink.stats) as on_progress:
            stats = stream(made, sink, sink.stats, on_progress)
        if made.request.batchnorm == "recalibrate":
            from gradmatch.output.batchnorm import recalibrate_folder

            recalibrate_folder(sink, batches)
        report = make_report(made, stats)
        report.heads = task_heads(made)
        sink.complete(card_files(made, report))
        verify(written(sink.folder, made), made)
        sink.publish()
    except OSError:
        sink.close_quietly()  # what was journalled stays for the next run
        raise
    except ValueError:
        sink.abandon()  # bad input: nothing of it is worth keeping
        raise
    except BaseException:
        sink.close_quietly()
        raise
    checkpoint = open_checkpoint(out, base=made.inputs.base)
    tied = made.inputs.base.aliases.items()
    checkpoint.aliases |= {name: held for name, held in tied if held in checkpoint.store}  # as in memory
    checkpoint.report = report
    return checkpoint


def task_heads(made: Plan) -> dict[str, dict[str, Tensor]]:
    """With heads="keep-per-task": every task's own head."""
    tasks = made.inputs.tasks
    return {
        tasks[t].name: {name: tasks[t].checkpoint[name] for name in names} for t, names in made.heads.items()
    }


class _bar:
    """A progress bar over bytes read, or nothing; it begins behind the tensors that an interrupted run has finished."""

    def __init__(self, made: Plan, shown: bool, finished: Collection[str]) -> None:
        self._made, self._shown = made, shown
        self._done = sum(step.bytes_read for step in made.steps if step.name in finished)
        self._tqdm: Any = None

    def __enter__(self) -> Callable[[int], None] | None:
        if not self._shown:
            return None
        from tqdm import tqdm

        self._tqdm = tqdm(
            total=self._made.bytes_read,
            initial=self._done,
            unit="B",
            unit_scale=True,
            desc=f"{self._made.request.method}{', resumed' if self._done else ''}",
        )
        update: Callable[[int], None] = self._tqdm.update
        return update

    def __exit__(self, *_: object) -> None:
        if self._tqdm is not None:
            self._tqdm.close()


def subtract(
    base: Model | Checkpoint,
    task: Task | Sequence[Task],
    *,
    base_curvature: CurvatureLike | float | None = None,
    weight: float = 1.0,
    keep: float = 0.1,
    guard: str = "floor",
    method: str = "removal",
    **options: Any,
) -> Mapping[str, Tensor]:
    """Remove what one or several tasks taught: Eq. 13 of Daheim et al. 2024, theta0 - alpha (H0 - alpha H_t)^-1 (H0 + H_t) tau_t.

    Args:
        base: the model to remove from.
        task: fine-tuned from the base on what is to go, with its curvature; one or several.
        base_curvature: the base's curvature; must stay above the tasks'.
        weight: alpha > 0, for all tasks, times each task's own weight.
        keep: at least keep * H0 must remain of H0 - alpha H_t.
        guard: how: "floor" floors it there; "scale" scales H_t down, which also bounds the step where the base knows next to
            nothing (see `gradmatch.rules.removal.removal`).
        method: "removal", or a baseline: "negation" (task arithmetic), "ewr", "fisher_negation".
        **options: as for `merge` (out, delta0, base_weight, dtype, ...).

    Returns:
        As `merge`. The report holds the clamped share overall and per tensor, the largest weight for given shares, and what moved.

    Raises:
        ValueError: as `merge`; also another method, a weight below 0, or a task with another tokenizer than the base.
    """
    from gradmatch.plan.request import REMOVALS
    from gradmatch.removal.problem import check_tokenizers
    from gradmatch.subtraction import largest_alpha, scaled

    tasks = [task] if isinstance(task, Task) else list(task)
    if method not in REMOVALS:
        from gradmatch.names import nearest

        raise ValueError(
            f"{method!r} is no way to subtract{nearest(method, REMOVALS)}; choose one of {', '.join(REMOVALS)}"
        )
    tasks = [scaled(one, weight) for one in tasks]
    for one in tasks:
        check_tokenizers(base, one.model)
    own: dict[str, Any] = {"keep": keep, "guard": guard} if method == "removal" else {}
    result = merge(base, tasks, method=method, base_curvature=base_curvature, **own, **options)
    if method == "removal":
        report: Report = result.report  # type: ignore[attr-defined]
        limits = largest_alpha(base, tasks, base_curvature, keep=keep, **options)
        report.largest_alpha = {
            s: limit if math.isinf(limit) else weight * limit for s, limit in limits.items()
        }
        from gradmatch.output.card import rewrite_card

        rewrite_card(result)
    return result


def analogy(
    base: Model | Checkpoint,
    a: Model | Task,
    b: Model | Task,
    c: Model | Task,
    *,
    method: str = "task_arithmetic",
    weight: float = 1.0,
    **options: Any,
) -> Mapping[str, Tensor]:
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
    from gradmatch.subtraction import scaled

    sign = {"a": -weight, "b": weight, "c": 1.0}
    tasks = []
    for letter, given in (("c", c), ("b", b), ("a", a)):
        one = given if isinstance(given, Task) else Task(given, name=letter)
        tasks.append(scaled(one, sign[letter], signed=True))
    return merge(base, tasks, method=method, **options)
