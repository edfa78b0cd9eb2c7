"""Causes in the models: weights that are not what they claim to be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradmatch.common.layers import layer_group
from gradmatch.diagnosis.cause import INPUT, Cause, Finder, priced
from gradmatch.diagnosis.causes_places import displaced, layers_swapped, rows_moved, transposed
from gradmatch.diagnosis.moved import KEPT
from gradmatch.diagnosis.repairs import saving_of, scaled_back, without
from gradmatch.measure import similarity

if TYPE_CHECKING:
    from gradmatch.diagnosis.evidence import Evidence
    from gradmatch.diagnosis.scan import TensorScan

HALF = 0.5
# A few layers may drift far in long training; only independent ones come near to orthogonal.
UNRELATED = 0.25
# A task vector nine tenths of which is a multiple of the base's own weights.
MULTIPLE = 0.9


def untouched(evidence: Evidence) -> list[Cause]:
    """A task that is the base itself: it only waters the merge down."""
    norms = evidence.scan.norms()
    if not evidence.scan.tensors or not any(norms.values()):
        return []  # of an experiment in which nothing was trained there is nothing to single out
    return [
        Cause(
            "task_is_base",
            task,
            f"every trained weight of {task!r} equals the base's: its task vector is zero",
            f"check the path of {task!r} (a folder that was saved before training, or an adapter that was never trained), or leave it out",
            INPUT,
        )
        for task, norm in norms.items()
        if norm == 0
    ]


def rescaled(evidence: Evidence) -> list[Cause]:
    """Matrices of a task that are the base's times a number: a scale that was applied twice, or lost."""
    causes = []
    for position, task in enumerate(evidence.scan.tasks):
        factors = {}
        for name, tensor in evidence.scan.tensors.items():
            c = _factor(tensor, position)
            if c is not None:
                factors[name] = c
        matrices = [name for name, tensor in evidence.scan.tensors.items() if any(tensor.rank)]
        scaled = [name for name in matrices if name in factors]
        if not scaled:
            continue
        name = max(scaled, key=lambda n: abs(math.log(abs(factors[n]))))
        causes.append(
            Cause(
                "rescaled_model" if len(scaled) > HALF * len(matrices) else "rescaled_layer",
                task,
                f"{len(scaled)} of {len(matrices)} matrices of {task!r} are the base's times a number, {name} times {factors[name]:.3g}: that is "
                "nine tenths or more of their difference",
                f"undo the scale (divide by {factors[name]:.3g}) before merging, or save {task!r} again",
                INPUT,
                *priced(saving_of(evidence, scaled_back, task, factors)),
                {"factor": factors[name], "tensors": float(len(scaled))},
            )
        )
    return causes


def _factor(tensor: TensorScan, position: int) -> float | None:
    """c of theta_t = c theta0 + rest (least squares) where the rest is small and c far from 1; else None."""
    if tensor.base_square == 0:
        return None
    c = 1 + float(tensor.base_dots[position]) / tensor.base_square
    own = float(tensor.gram[position, position])  # ||tau||^2
    rest = own - (c - 1) ** 2 * tensor.base_square
    far = abs(c) > 1e-6 and not KEPT <= c <= 1 / KEPT  # a zero is told by zero_tensors
    return c if far and rest <= (1 - MULTIPLE) * own else None


def wrong_base(evidence: Evidence) -> bool:
    """Whether all tasks share next to nothing with the base in most of their matrices, and much with one another."""
    t = len(evidence.scan.tasks)
    if t < 2:
        return False
    strange = weights = 0
    for tensor in evidence.scan.tensors.values():
        if not any(tensor.rank):
            continue
        weights += tensor.numel
        # theta_s'theta_t = ||theta0||^2 + theta0'(tau_s + tau_t) + tau_s'tau_t
        dots = tensor.base_square + tensor.base_dots[:, None] + tensor.base_dots[None, :] + tensor.gram
        close = similarity.cosines(dots)
        if float(tensor.cosine.max()) < KEPT and float(close.min()) >= KEPT:
            strange += tensor.numel
    return strange > HALF * weights


def other_base(evidence: Evidence) -> list[Cause]:
    """A model that was not fine-tuned from this base: its matrices are as good as orthogonal to the base's.

    Where that holds of all tasks, while they are close to one another, it is the base that is wrong.
    """
    matrices = {name: t for name, t in evidence.scan.tensors.items() if any(t.rank)}
    if wrong_base(evidence):
        cosine = max(float(t.cosine.max()) for t in matrices.values())
        return [
            Cause(
                "other_base",
                "base",
                f"none of the {len(evidence.scan.tasks)} tasks resembles the base given (the largest cosine of a matrix is {cosine:.2f}), while "
                "they resemble one another: they were fine-tuned from another model",
                "give the model that they were fine-tuned from as the base (the very checkpoint, not another size, seed or step)",
                INPUT,
                None,
                "",
                {"cosine": cosine},
            )
        ]
    causes = []
    for position, task in enumerate(evidence.scan.tasks):
        elsewhere = displaced(evidence, task)
        judged = {n: t for n, t in matrices.items() if n not in elsewhere}
        weights = sum(t.numel for t in judged.values())
        # A long task vector bends a matrix away as well, but the base's weights are still in it: theta0'theta_t / ||theta0||^2 is near 1.
        far = {
            n: float(t.cosine[position])
            for n, t in judged.items()
            if float(t.cosine[position]) < KEPT
            and 1 + float(t.base_dots[position]) / max(1e-300, t.base_square) < HALF
        }
        near = sum(judged[n].numel for n in far)
        whole = near > HALF * weights
        layers = [n for n, cosine in far.items() if whole or cosine < UNRELATED]
        if not layers or elsewhere:
            continue
        ratio = math.sqrt(
            float(sum(judged[n].gram[position, position] for n in layers))
            / max(1e-300, sum(judged[n].base_square for n in layers))
        )
        name = min(far, key=far.__getitem__)
        causes.append(
            Cause(
                "other_base",
                task,
                f"{task!r} shares next to nothing with the base in {len(layers)} of {len(matrices)} matrices "
                f"(cosine {far[name]:.2f} in {name}; its task vector there is {ratio:.1f} times as long as the base's weights)",
                f"fine-tune {task!r} from this very base (same seed of new layers), or leave it out"
                if whole
                else f"leave {layer_group(name)} of {task!r} out of the merge, start all tasks from one initialisation of it, or, where it "
                f"should be the base's, save {task!r} again: it may be damaged",
                INPUT,
                *priced(saving_of(evidence, without, task)),
                {"cosine": far[name], "share": near / max(1, weights), "length": ratio},
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


MODEL_FINDERS: tuple[Finder, ...] = (
    rows_moved,
    transposed,
    layers_swapped,
    rescaled,
    other_base,
    untouched,
    copied_layers,
)


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
