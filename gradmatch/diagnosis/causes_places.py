"""Causes in weights that are the base's, in another place: rows moved, matrices transposed, layers exchanged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from gradmatch.common.layers import layer_group
from gradmatch.diagnosis.cause import INPUT, Cause, cause, plural
from gradmatch.diagnosis.moved import KEPT
from gradmatch.diagnosis.repairs import rolled, saving_of, turned_back, without

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from gradmatch.diagnosis.evidence import Evidence
    from gradmatch.diagnosis.scan import TensorScan
    from gradmatch.models.checkpoint import Checkpoint

HALF = 0.5
RUNS, RUN = 64, 64  # evenly spaced values of a matrix by which layers are told apart: cosines to within 1/64
TOKENS = re.compile(r"embed|wte|lm_head|(^|\.)shared\.", re.IGNORECASE)


def rows_moved(evidence: Evidence) -> Iterator[Cause]:
    """Rows of a matrix that sit where others were: a vocabulary shifted by one offset or in another order, or permuted neurons."""
    for position, task in enumerate(evidence.scan.tasks):
        kinds: dict[str, list[str]] = {}
        for name, tensor in evidence.scan.tensors.items():
            if rows_elsewhere(tensor, position):
                moved = tensor.moved[position]
                shifted = moved.offset != 0 and moved.offset_share > HALF
                tokens = _rows_are_tokens(evidence, name, moved.rows)
                kind = "vocabulary_shift" if shifted else "vocabulary_order" if tokens else "permuted_neurons"
                kinds.setdefault(kind, []).append(name)
        for kind, names in kinds.items():
            name = names[0]
            moved = evidence.scan.tensors[name].moved[position]
            offset, amount = moved.offset, moved.suspects
            saving = None
            text = f"{amount} rows of {name} in {task!r} are closest to other rows of the base: "
            if kind == "vocabulary_shift":
                amount, offset = offset, offset - moved.rows * (offset > moved.rows / 2)
                saving = saving_of(evidence, rolled, task, name, offset)
                text = (
                    f"most rows of {name} in {task!r} equal the base's rows {abs(offset)} {plural(abs(offset), 'place', 'places')} "
                    f"{'later' if offset > 0 else 'earlier'}"
                )
                remedy = "align the vocabularies (map tokens by their text) before merging"
            elif kind == "vocabulary_order":
                text += "its tokens are numbered otherwise"
                remedy = f"compare the tokenizers of {task!r} and the base, and put its rows in the base's order (map tokens by their text)"
            else:
                text += "its neurons are in another order"
                remedy = f"put the neurons of {task!r} into the base's order before merging: {align_command(evidence, task)}"
            saving = saving or saving_of(evidence, without, task)
            numbers = {"tensors": float(len(names)), "rows": float(amount)}
            yield cause(kind, task, text, remedy, INPUT, saving, **numbers)


def align_command(evidence: Evidence, task: str) -> str:
    """What brings a model of another beginning into the base's order of units."""
    base, model = evidence.base.path, evidence.tasks[task].path
    if base is None or model is None:
        return "gradmatch.rebasin.align(model, to=base), or align='weights' in the merge"
    return f"`gradmatch align {model} --to {base} -o ALIGNED`, or `align: weights` in the recipe"


def rows_elsewhere(tensor: TensorScan, position: int) -> bool:
    """Whether a task's matrix holds the base's rows in another order: a quarter of them moved, most of those to a place of their own."""
    moved = tensor.moved.get(position)
    return moved is not None and moved.suspects >= moved.rows / 4 and moved.elsewhere > HALF


def transposed(evidence: Evidence) -> Iterator[Cause]:
    """Square matrices of a task that are the base's with rows and columns exchanged: another convention of storing them."""
    for position, task in enumerate(evidence.scan.tasks):
        names = [name for name, tensor in evidence.scan.tensors.items() if position in tensor.transposed]
        if names:
            yield cause(
                "transposed_weight",
                task,
                f"{_counted(names)} of {task!r} {plural(len(names))} nearer to the base's with rows and columns exchanged: {names[0]}",
                "transpose before merging (Linear stores (out, in), Conv1D (in, out))",
                INPUT,
                saving_of(evidence, turned_back, task, names),
                tensors=float(len(names)),
            )


def layers_swapped(evidence: Evidence) -> Iterator[Cause]:
    """Matrices of a task that are the base's of another layer: layers exchanged, or numbered otherwise."""
    for task in evidence.scan.tasks:
        found = places(evidence, task)
        if found:
            name, other = next(iter(found.items()))
            layers = {layer_group(n) for n in found}
            inside = [n for n in evidence.scan.tensors if layer_group(n) in layers]
            yield cause(
                "layers_swapped",
                task,
                f"{_counted(found)} of {task!r} {plural(len(found))} nearer to the base's of another layer: {name} is its {other}",
                f"rename the layers of {task!r} as the base numbers them, or leave them out",
                INPUT,
                saving_of(evidence, without, task, inside),
                tensors=float(len(found)),
            )


def places(evidence: Evidence, task: str) -> dict[str, str]:
    """Matrix of a task that kept little of itself -> the matrix of the base that it resembles; each place once. Found once."""
    if task in evidence.places:
        return evidence.places[task]
    position = evidence.scan.tasks.index(task)
    found = evidence.places[task] = {}
    far: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in evidence.scan.tensors.items():
        if any(tensor.rank) and float(tensor.cosine[position]) < KEPT and not _explained(tensor, position):
            far.setdefault(evidence.base.spec(name).shape, []).append(name)
    for shape, names in far.items():
        known = [name for name in evidence.scan.tensors if evidence.base.spec(name).shape == shape]
        if len(known) < 2:
            continue
        old = torch.stack([_sampled(evidence.base, name) for name in known])
        new = torch.stack([_sampled(evidence.tasks[task], name) for name in names])
        close, match = (new @ old.T).max(1)
        for name, cosine, index in zip(names, close.tolist(), match.tolist(), strict=True):
            if cosine >= KEPT and known[index] not in (name, *found.values()):
                found[name] = known[index]
    return found


def displaced(evidence: Evidence, task: str) -> set[str]:
    """Matrices of a task that are the base's in another place: they say nothing of where the task came from."""
    position = evidence.scan.tasks.index(task)
    moved = {name for name, tensor in evidence.scan.tensors.items() if _explained(tensor, position)}
    return moved | set(places(evidence, task))


def _explained(tensor: TensorScan, position: int) -> bool:
    return rows_elsewhere(tensor, position) or position in tensor.transposed


def _sampled(model: Checkpoint, name: str) -> Tensor:
    """RUNS x RUN values as a unit vector, or all of a small tensor."""
    numel = model.spec(name).numel
    size = min(RUN, numel) if numel > RUNS * RUN else numel
    starts = (round(i * (numel - size) / (RUNS - 1)) for i in range(RUNS if size < numel else 1))
    values = torch.cat([model.block(name, start, start + size) for start in starts])
    return torch.nn.functional.normalize(values.float(), dim=0)


def _counted(names: Sequence[str] | dict[str, str]) -> str:
    return f"{len(names)} {plural(len(names), 'matrix', 'matrices')}"


def _rows_are_tokens(evidence: Evidence, name: str, rows: int) -> bool:
    """Whether a matrix has a row for each token: as many as the configuration says, or named like one."""
    return (evidence.base.config or {}).get("vocab_size") == rows or bool(TOKENS.search(name))
