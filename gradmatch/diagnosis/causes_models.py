"""Causes in the models: values that are broken, weights that are not what they claim to be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradmatch.diagnosis.causes import BROKEN, INPUT, Cause, Finder, priced
from gradmatch.diagnosis.layers import layer_group
from gradmatch.diagnosis.repairs import rolled, saving_of, without

if TYPE_CHECKING:
    from gradmatch.diagnosis.evidence import Evidence

HALF = 0.5
# At a cosine of 1/sqrt(2) as much of a tensor is new as is kept: below, it is nearer to an unrelated one than to the base.
KEPT = math.sqrt(0.5)
# A few layers may drift far in long training; only independent ones come near to orthogonal.
UNRELATED = 0.25


def not_finite(evidence: Evidence) -> list[Cause]:
    """NaN or infinite weights; the merge's own are told only where no input explains them."""
    found = evidence.scan.nonfinite
    blamed = [model for model in found if model != "merged"] or list(found)
    causes = []
    for model in blamed:
        tensor, count = max(found[model].items(), key=lambda item: item[1])
        total = sum(found[model].values())
        causes.append(
            Cause(
                "not_finite",
                model,
                f"{total} weights of {model!r} are NaN or infinite, {count} of them in {tensor}",
                f"fetch or train {model!r} again; everything merged with these values is NaN as well"
                if model != "merged"
                else "merge again: the inputs are finite, so the rule or the output's dtype overflowed",
                BROKEN,
                math.inf,
                "measured",
                {"count": float(total), "tensors": float(len(found[model]))},
            )
        )
    return causes


def shapes_differ(evidence: Evidence) -> list[Cause]:
    """Tensors that a model lacks or has in another shape: another head, vocabulary or architecture."""
    causes = []
    for model, shapes in evidence.scan.shapes.items():
        missing = evidence.scan.missing[model]
        if not shapes and not missing:
            continue
        if shapes:
            name, (ours, theirs) = next(iter(shapes.items()))
            what = f"{name} is {list(theirs)} in {model!r} and {list(ours)} in the base"
        else:
            what = f"{model!r} lacks {missing[0]}"
        count = len(shapes) + len(missing)
        causes.append(
            Cause(
                "shapes_differ",
                model,
                f"{what}; {count} tensors cannot be merged",
                "carry such layers beside the trunk (a head or vocabulary policy of the merge), or take a fine-tune of this base",
                BROKEN,
                None,
                "",
                {"shapes": float(len(shapes)), "missing": float(len(missing))},
            )
        )
    return causes


def rows_moved(evidence: Evidence) -> list[Cause]:
    """Rows of a matrix that sit where others were: a shifted vocabulary (one offset), or permuted neurons."""
    causes = []
    for position, task in enumerate(evidence.scan.tasks):
        kinds: dict[str, list[tuple[str, int]]] = {}
        for name, tensor in evidence.scan.tensors.items():
            moved = tensor.moved.get(position)
            if moved and moved.suspects >= moved.rows / 4 and moved.elsewhere > HALF:
                shifted = moved.offset != 0 and moved.offset_share > HALF
                kinds.setdefault("vocabulary_shift" if shifted else "permuted_neurons", []).append(
                    (name, moved.offset if shifted else moved.suspects)
                )
        for kind, tensors in kinds.items():
            name, amount = tensors[0]
            if kind == "vocabulary_shift":
                rows = evidence.scan.tensors[name].moved[position].rows
                offset = amount - rows if amount > rows / 2 else amount
                saving = saving_of(evidence, rolled, task, name, offset)
                text = f"most rows of {name} in {task!r} equal the base's rows {abs(offset)} place{'s' if abs(offset) > 1 else ''} {'later' if offset > 0 else 'earlier'}"
                remedy = "align the vocabularies (map tokens by their text) before merging"
            else:
                saving = saving_of(evidence, without, task)
                text = f"{amount} rows of {name} in {task!r} are closest to other rows of the base: its neurons are in another order"
                remedy = f"permute the neurons of {task!r} back (match them to the base's) before merging, or leave it out"
            causes.append(
                Cause(
                    kind,
                    task,
                    text,
                    remedy,
                    INPUT,
                    *priced(saving),
                    {"tensors": float(len(tensors)), "rows": float(amount)},
                )
            )
    return causes


def other_base(evidence: Evidence) -> list[Cause]:
    """A model that was not fine-tuned from this base: its matrices are as good as orthogonal to the base's."""
    causes = []
    matrices = {name: t for name, t in evidence.scan.tensors.items() if t.rank[0] or any(t.rank)}
    for position, task in enumerate(evidence.scan.tasks):
        far, near, weights, unrelated = [], 0, 0, 0
        for name, tensor in matrices.items():
            moved = tensor.moved.get(position)
            if moved and moved.suspects >= moved.rows / 4 and moved.elsewhere > HALF:
                continue  # the rows are the base's, in another order: told by rows_moved
            weights += tensor.numel
            cosine = float(tensor.cosine[position])
            if cosine < KEPT:
                far.append((cosine, name))
                near += tensor.numel
            if cosine < UNRELATED:
                unrelated += tensor.numel
        whole = near > HALF * weights
        permuted = any(
            t.moved.get(position) and t.moved[position].elsewhere > HALF for t in matrices.values()
        )
        layers = [name for cosine, name in far if whole or cosine < UNRELATED]
        if not layers or permuted:
            continue
        ratio = math.sqrt(
            float(sum(matrices[n].gram[position, position] for n in layers))
            / max(1e-300, sum(matrices[n].base_square for n in layers))
        )
        cosine, name = min(far)
        causes.append(
            Cause(
                "other_base",
                task,
                f"{task!r} shares next to nothing with the base in {len(layers)} of {len(matrices)} matrices "
                f"(cosine {cosine:.2f} in {name}; its task vector there is {ratio:.1f} times as long as the base's weights)",
                f"fine-tune {task!r} from this very base (same seed of new layers), or leave it out"
                if whole
                else f"leave {layer_group(name)} of {task!r} out of the merge, or start all tasks from one initialisation of it",
                INPUT,
                *priced(saving_of(evidence, without, task)),
                {"cosine": cosine, "share": near / max(1, weights), "length": ratio},
            )
        )
    return causes


def copied_layers(evidence: Evidence) -> list[Cause]:
    """Two tasks with the very same fine-tuned values in some layers only: one wears the head of the other."""
    causes = []
    groups = evidence.scan.groups()
    tasks = evidence.scan.tasks
    for i in range(len(tasks)):
        for j in range(i):
            same: list[str] = []
            different: list[str] = []
            for group, names in groups.items():
                g = evidence.scan.gram(names)
                if float(g[i, i]) == 0 and float(g[j, j]) == 0:
                    continue
                gap = float(g[i, i] + g[j, j] - 2 * g[i, j])
                (same if gap <= 1e-9 * float(g[i, i] + g[j, j]) else different).append(group)
            if not same:
                continue
            names = [name for group in same for name in groups[group]]
            wearer, owner = _wearer(evidence, tasks[i], tasks[j], names)
            subject = wearer if owner else f"{tasks[j]} and {tasks[i]}"
            if different:
                what = (
                    f"{wearer!r} holds the same values as that of {owner!r}"
                    if owner
                    else f"{subject} holds the same values"
                )
                text = f"{', '.join(same[:3])} of {what}, while their other layers differ"
                remedy = f"give {wearer!r} its own head, or keep each task's head beside the merged trunk"
            else:
                text = f"{tasks[j]!r} and {tasks[i]!r} are the same model"
                remedy = f"leave {wearer!r} out, or give the pair the weight of one"
            saving = saving_of(evidence, without, wearer, names) if different else None
            causes.append(
                Cause(
                    "head_of_another_task" if different else "same_model_twice",
                    subject,
                    text,
                    remedy,
                    INPUT,
                    *priced(saving),
                    {"layers": float(len(same))},
                )
            )
    return causes


MODEL_FINDERS: tuple[Finder, ...] = (not_finite, shapes_differ, rows_moved, other_base, copied_layers)


def _wearer(evidence: Evidence, a: str, b: str, names: list[str]) -> tuple[str, str]:
    """(wearer, owner) of layers that two tasks share: the owner's own loss would miss them more, were they the base's.

    The owner is "" where data does not tell (the two losses within two standard errors of one another).
    """
    if a not in evidence.losses or b not in evidence.losses or not {a, b} <= set(evidence.objectives):
        return a, ""
    missed, variance = {}, 0.0
    for task in (a, b):
        weights = {**evidence.tasks[task], **{name: evidence.base[name] for name in names}}
        difference = evidence.objectives[task].losses(weights) - evidence.losses[task][task]
        missed[task] = float(difference.mean())
        variance += float(difference.var()) / len(difference) if len(difference) > 1 else 0.0
    wearer, owner = sorted((a, b), key=missed.__getitem__)
    return wearer, owner if missed[owner] - missed[wearer] > 2 * math.sqrt(variance) else ""
