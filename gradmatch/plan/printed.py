"""A plan in print: every tensor, its rule, policy, dtype and bytes; totals, memory, and whether the disk has room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gradmatch.plan.step import Plan, Step
from gradmatch.rules import Solve, Whole
from gradmatch.rules.after import AFTER

BLOCK = 131_072  # values of a piece where a rule needs no more
# bytes that the C library may keep at hand for each worker, see `gradmatch.engine.workers.STEADY`
KEPT = 16 * 2**20
# of the factors of adapters, with their bases, in double precision, as a multiple of them in float32
CORES = 8
EDITED = 4, 3  # of task vectors that a rule would take one by one, but that their edits need side by side


def describe(made: Plan, out: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """Lines of the printed plan."""
    request, inputs = made.request, made.inputs
    yield f"method {request.method}: {made.formula}  ({request.rule.source})"
    yield f"base {inputs.base.where}"
    for task in inputs.tasks:
        known = f", curvature N = {task.curvature.num_examples}" if task.curvature else ""
        yield f"task {task.name}: {task.checkpoint.where}, weight {task.weight}{known}"
    settings = [_settings(step) for step in made.merged]
    usual = max(dict.fromkeys(settings), key=settings.count, default="")
    if usual:
        yield f"options {usual}"
    yield ""
    width = max((len(step.name) for step in made.steps), default=0)
    for step in made.steps:
        yield f"{step.name:<{width}}  {_action(step, usual)}"
    yield ""
    yield from made.notes
    yield from (f"dropped: {name}" for name in made.dropped)
    where = "" if request.device == "cpu" else f", the most of it on {request.device}"
    yield (
        f"reads {readable(made.bytes_read)}, writes {readable(made.bytes_written)}, "
        f"peak memory about {readable(peak_bytes(made))} beside the interpreter and torch{where}"
    )
    if out is not None:
        parent = next(folder for folder in Path(out).resolve().parents if folder.exists())
        free = shutil.disk_usage(parent).free
        verdict = "enough" if free > made.bytes_written else "NOT ENOUGH"
        yield f"free on the disk of {out}: {readable(free)}: {verdict}"


def peak_bytes(made: Plan) -> int:
    """Anonymous memory of the engine: as many workers as there are hold what the tensors with most need, see `Rule.memory`."""
    workers = min(4, os.cpu_count() or 1)
    shared = [
        step for step in made.steps if step.span == "block" and not step.assembles
    ] * workers  # all of them may be at one large tensor
    whole = [step for step in made.steps if step.span != "block" or step.assembles]
    block = BLOCK if made.request.device == "cpu" else 32 * BLOCK
    held = sorted((_held_bytes(step, block) for step in shared + whole), reverse=True)[:workers]
    return sum(held) + workers * KEPT


def _held_bytes(step: Step, block: int) -> int:
    """What a worker holds while it merges one tensor, in blocks where it can."""
    if step.rule is None:
        return 0
    if step.path == "core":
        return CORES * step.bytes_read + 4 * 8 * sum(map(int, step.spec.shape)) * step.rank
    fixed, per_task = step.rule.memory
    if isinstance(step.rule, (Whole, Solve)) and step.rule.streams and step.edits:
        fixed, per_task = fixed + EDITED[0], per_task + EDITED[1]
    longest_row = step.spec.shape[-1] if step.spec.shape else 1
    piece = {"block": block, "rows": max(BLOCK, longest_row), "tensor": step.spec.numel}[step.span]
    values = min(piece, step.spec.numel) * (fixed + per_task * len(step.tasks))
    if isinstance(step.rule, Whole) and step.rule.square:
        values += step.rule.square * _smaller_side(step) ** 2
    if isinstance(step.rule, Solve) and step.rule.square:
        values += step.rule.square * (step.spec.numel // max(1, step.spec.shape[0])) ** 2
    if step.assembles:
        values += sum(AFTER[name].memory * step.spec.numel for name, _ in step.after)
        values += sum(AFTER[name].square for name, _ in step.after) * _smaller_side(step) ** 2
    # a system is solved in double precision, and as much is made of the factors
    solved = isinstance(step.rule, Solve)
    solving = 4 * step.bytes_read if isinstance(step.rule, Solve) and not step.rule.streams else 0
    return int(values * (8 if step.compute == "F64" or solved else 4)) + solving


def _smaller_side(step: Step) -> int:
    """Of a tensor as a matrix, the kernels of a convolution as rows."""
    return min(step.spec.shape[0], step.spec.numel // max(1, step.spec.shape[0]))


def _settings(step: Step) -> str:
    """Options of the rule and of the edits, as they hold for one tensor."""
    options = {key: value for key, value in step.options.items() if value is not None}
    parts = [str(options)] if options else []
    return ", ".join([*parts, *(f"{name} {dict(own)}" for name, own in (*step.edits, *step.after))])


def _action(step: Step, usual: str) -> str:
    """One tensor's line; its settings where they are not the usual ones."""
    dtypes = step.spec.dtype if step.spec.dtype == step.compute else f"{step.compute} -> {step.spec.dtype}"
    text = f"{step.kind:<11} {dtypes:<12} {list(step.spec.shape)!s:<16} {readable(step.bytes_read):>9}"
    if step.merged:
        alpha = ", ".join(f"{weight:g}" for weight in step.alpha)
        text += f"  alpha [{alpha}]"
        text += f"  {_settings(step)}" if _settings(step) != usual else ""
    return f"{text}  {step.why}".rstrip()


def readable(count: float) -> str:
    """Bytes in readable units."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
