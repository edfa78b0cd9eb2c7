"""prepare -> execute: everything is planned and checked before the first value is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from gradmatch.common.warning import warn
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.progress import shown
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.curvatures import CurvatureStore
from gradmatch.models.opening import open_checkpoint
from gradmatch.models.task import Model, Task
from gradmatch.output.report import Report, make_report
from gradmatch.plan.core import plan_core
from gradmatch.plan.inputs import Inputs
from gradmatch.plan.opened import open_inputs
from gradmatch.plan.plan import plan
from gradmatch.plan.request import Request
from gradmatch.plan.step import Plan, no_posterior

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.estimators.curvature import Curvature

CurvatureLike = Union["Curvature", str, "os.PathLike[str]"]
NO_CONFIG = "no config.json is written, as the base comes without one: transformers cannot load the output; give the base as a folder"
REQUEST_FIELDS = tuple(name for name in Request.__dataclass_fields__ if name != "options")
RUNNING = ("out", "overwrite", "batches", "progress", "posterior")  # arguments of `execute`
POSTERIOR = "posterior.safetensors"  # in a merged folder


class Merged(dict[str, "Tensor"]):
    """A merged state dict, with the `report` of the merge, its `plan` and `save`; a merge into a folder is a Checkpoint with the same.

    Of merged adapters: their factors by peft's names, and `config`, what adapter_config.json says of them.
    """

    report: Report
    made: Plan
    config: Mapping[str, Any] | None = None

    @property
    def plan(self) -> Plan:
        """What was planned for every tensor, and the inputs.

        Raises:
            ValueError: a copy or a pickle, which does not hold it.
        """
        if "made" not in vars(self):
            raise GradmatchError(
                "a copy of a merge holds its tensors and report, not its plan", "bad_arguments"
            )
        return self.made

    def save(self, out: str | os.PathLike[str], **options: Any) -> None:
        """Write the same merge as a folder that transformers loads, with its card: computed again, tensor by tensor, from its inputs.

        Args:
            out: folder to write.
            **options: overwrite, batches, progress and posterior of `merge`.

        Raises:
            ValueError, FileExistsError, OSError: as `merge` with `out`.

        Example:
            >>> merge("base", [Task("a"), Task("b")], method="averaging").save("merged")      # doctest: +SKIP
        """
        execute(self.plan, out, **options)

    @cached_property
    def posterior(self) -> Curvature:
        """The sum of the precisions of all beliefs, as a curvature at the merged weights; read from the curvatures when asked for.

        Raises:
            ValueError: the rule has no precision in nats.
        """
        from gradmatch.engine.posterior import posterior_of
        from gradmatch.estimators.fingerprint import model_sampler

        return posterior_of(self.made, model_sampler(self))

    def __repr__(self) -> str:
        weights = sum(value.numel() for value in self.values())
        return f"Merged({self.report.method}, {len(self)} tensors, {weights:,} weights; see .report)"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps beside the tensors: not the plan, which holds open files."""
        return {key: value for key, value in vars(self).items() if key != "made"}

    def _repr_html_(self) -> str:
        return f"<b>{escape(repr(self))}</b><pre>{escape(self.report.summary())}</pre>"


def merge(base: Model | Checkpoint, tasks: Sequence[Task], **options: Any) -> Merged | Checkpoint:
    """Merge with weights that are given. Arguments, result and errors as in `gradmatch.merge`, which chooses weights too."""
    running = {name: options.pop(name) for name in RUNNING if name in options}
    return execute(prepare(base, tasks, **options), **running)


def prepare(
    base: Model | Checkpoint,
    tasks: Sequence[Task],
    *,
    base_curvature: CurvatureLike | float | None = None,
    anchor: Model | Checkpoint | None = None,
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
        anchor=anchor,
        allow_mismatch=allow_mismatch,
        allow_pickle=allow_pickle,
    )
    from gradmatch.plan.vocab import tokenizer_of

    apart = check_units(inputs, request, allow_mismatch)
    files, said = tokenizer_of(inputs, request)
    made = plan_core(inputs, request) if request.space == "core" else plan(inputs, request)
    made.files = files
    opened = [
        note
        for model in (inputs.base, *(t.checkpoint for t in inputs.tasks))
        for note in model.original.notes
    ]
    made.notes += [*dict.fromkeys(opened), *apart, *said]
    if inputs.base.folder and request.space == "weights":
        from gradmatch.output.carried import carried_notes

        made.notes += carried_notes(inputs.base.folder)
    return made


def check_units(inputs: Inputs, request: Request, allow_mismatch: bool) -> list[str]:
    """Compare the sizes of all curvatures that the rule weighs against one another; notes where they are far apart.

    Raises:
        ValueError: curvatures of different estimators, more than a thousand times apart per example.
    """
    if "curvature" not in request.rule.needs or request.options.get("normalize_fishers"):
        return []
    from gradmatch.models.units import compare_units

    stores = {task.name: task.mean for task in inputs.tasks}
    if isinstance(inputs.base_curvature, CurvatureStore):
        stores["the base"] = inputs.base_curvature
    notes = []
    for apart in compare_units({who: store.curvature for who, store in stores.items() if store is not None}):
        if apart.hopeless and not allow_mismatch:
            raise GradmatchError(
                f"{apart.text}; estimate both in the same way (`gradmatch estimate`), or pass allow_mismatch=True if you know better",
                "other_units",
                apart.larger,
            )
        notes.append(apart.text)
        if not allow_mismatch:
            warn(f"{apart.text}; estimate both in the same way (`gradmatch estimate`)")
    return notes


def execute(
    made: Plan,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    batches: Any = None,
    progress: bool | None = None,
    posterior: bool = False,
) -> Merged | Checkpoint:
    """Carry out a plan; see `merge`."""
    if posterior:
        if error := no_posterior(made.request):
            raise error
        from gradmatch.engine.posterior import inexact

        if why := inexact(made):
            made.notes.append(
                f"no task can be taken out of this merge again by its posterior (unmerge): {why}"
            )
    if made.request.batchnorm == "recalibrate":
        from gradmatch.output.batchnorm import check_batches

        check_batches(made.inputs.base, batches)
    if made.adapters:
        return _as_adapter(made, out, overwrite, progress)
    if out is None:
        return _in_memory(made, batches, progress)
    return _to_folder(made, Path(out), overwrite, batches, progress, posterior)


def _in_memory(made: Plan, batches: Any, progress: bool | None) -> Merged:
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
    merged.made = made
    merged.report = make_report(made, stats)
    merged.report.heads = task_heads(made)
    return merged


def _to_folder(
    made: Plan, out: Path, overwrite: bool, batches: Any, progress: bool | None, posterior: bool
) -> Checkpoint:
    """The result as a folder that appears whole."""
    from gradmatch.engine.stream import stream
    from gradmatch.output.card import card_files
    from gradmatch.output.identity import identity
    from gradmatch.output.verify import verify
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
        if not made.inputs.base.config:
            report.notes.append(NO_CONFIG)
        sink.complete(card_files(made, report))
        written = open_checkpoint(sink.folder)
        verify(written, made)
        if posterior:
            from gradmatch.engine.posterior import posterior_of

            posterior_of(made, written.sample).save(sink.folder / POSTERIOR)
        sink.publish()
    except BaseException as error:
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            sink.abandon()  # bad input: nothing of it is worth keeping
        else:
            sink.close_quietly()  # what was journalled stays for the next run
        raise
    checkpoint = open_checkpoint(out, base=made.inputs.base)
    tied = made.inputs.base.aliases.items()
    checkpoint.aliases |= {name: held for name, held in tied if held in checkpoint.store}  # as in memory
    checkpoint.report, checkpoint.plan = report, made
    if posterior:
        from gradmatch.estimators.curvature import Curvature

        checkpoint.posterior = Curvature.load(out / POSTERIOR)
    return checkpoint


def _as_adapter(
    made: Plan, out: str | os.PathLike[str] | None, overwrite: bool, progress: bool | None
) -> Merged | Checkpoint:
    """The merged adapter: its tensors by peft's names and its config, or a folder, opened on the base."""
    from gradmatch.engine.core import merge_adapters
    from gradmatch.output.adapter import adapter_config, write_adapter
    from gradmatch.output.publishing import check_absent, place

    if out is not None:
        check_absent(place(out), overwrite)
    with _bar(made, progress, ()) as on_progress:
        tensors, stats = merge_adapters(made, on_progress)
    report = make_report(made, stats)
    if out is None:
        merged = Merged(tensors)
        merged.report, merged.made, merged.config = report, made, adapter_config(made, tensors)
        return merged
    folder = write_adapter(Path(out), made, tensors, report, overwrite=overwrite)
    checkpoint = open_checkpoint(folder, base=made.inputs.base)
    checkpoint.report, checkpoint.plan = report, made
    return checkpoint


def task_heads(made: Plan) -> dict[str, dict[str, Tensor]]:
    """With heads="keep-per-task": every task's own head."""
    tasks = made.inputs.tasks
    return {
        tasks[t].name: {name: tasks[t].checkpoint[name] for name in names} for t, names in made.heads.items()
    }


@contextmanager
def _bar(
    made: Plan, progress: bool | None, finished: Collection[str]
) -> Iterator[Callable[[int], object] | None]:
    """A progress bar over bytes read, or nothing; it begins behind the tensors that an interrupted run has finished."""
    if not shown(progress):
        yield None
        return
    from tqdm import tqdm

    done = sum(step.bytes_read for step in made.steps if step.name in finished)
    title = f"{made.request.method}{', resumed' if done else ''}"
    with tqdm(total=made.bytes_read, initial=done, unit="B", unit_scale=True, desc=title) as bar:
        yield bar.update
