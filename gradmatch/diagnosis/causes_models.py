"""Causes in the models: weights that are not what they claim to be."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

from gradmatch.common.layers import layer_group
from gradmatch.diagnosis.cause import INPUT, Cause, cause, plural
from gradmatch.diagnosis.causes_places import align_command, displaced
from gradmatch.diagnosis.evidence import error_of_mean
from gradmatch.diagnosis.moved import KEPT
from gradmatch.diagnosis.repairs import restored, saving_of, scaled_back, without
from gradmatch.measure import similarity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradmatch.diagnosis.evidence import Evidence
    from gradmatch.diagnosis.scan import TensorScan

HALF = 0.5
# A few layers may drift far in long training; only independent ones come near to orthogonal.
UNRELATED = 0.25
# A task vector nine tenths of which is a multiple of the base's own weights.
MULTIPLE = 0.9


def untouched(evidence: Evidence) -> Iterator[Cause]:
    """A task that is the base itself: it only waters the merge down."""
    norms = evidence.scan.norms()
    for task in evidence.scan.tasks if any(norms.values()) else ():  # else nothing was trained at all
        if norms[task] == 0:
            yield cause(
                "task_is_base",
                task,
                f"every trained weight of {task!r} equals the base's: its task vector is zero",
                f"check the path of {task!r} (a folder that was saved before training, or an adapter that was never trained), or leave it out",
                INPUT,
            )


def zero_tensors(evidence: Evidence) -> Iterator[Cause]:
    """Weights that are zero everywhere in a model while the base's are not: lost in saving or loading."""
    for model, names in evidence.scan.zeros.items():
        count, be = len(names), plural(len(names))
        yield cause(
            "zero_tensor",
            model,
            f"{count} {plural(count, 'tensor', 'tensors')} of {model!r} {be} zero everywhere, {names[0]} among them; the base's {be} not",
            f"fetch or save {model!r} again",
            INPUT,
            saving_of(evidence, restored, model, names),
            tensors=float(count),
        )


def rescaled(evidence: Evidence) -> Iterator[Cause]:
    """Matrices of a task that are the base's times a number: a scale that was applied twice, or lost."""
    tensors = evidence.scan.tensors
    matrices = [name for name, tensor in tensors.items() if any(tensor.rank)]
    for position, task in enumerate(evidence.scan.tasks):
        found = {name: _factor(tensor, position) for name, tensor in tensors.items()}
        factors = {name: factor for name, factor in found.items() if factor is not None}
        scaled = [name for name in matrices if name in factors]
        if scaled:
            name = max(scaled, key=lambda n: abs(math.log(abs(factors[n]))))
            yield cause(
                "rescaled_model" if len(scaled) > HALF * len(matrices) else "rescaled_layer",
                task,
                f"{len(scaled)} of {len(matrices)} matrices of {task!r} are the base's times a number, {name} times {factors[name]:.3g}: "
                "that is nine tenths or more of their difference",
                f"undo the scale (divide by {factors[name]:.3g}) before merging, or save {task!r} again",
                INPUT,
                saving_of(evidence, scaled_back, task, factors),
                factor=factors[name],
                tensors=float(len(scaled)),
            )


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
    strange = weights = 0
    for tensor in evidence.scan.tensors.values() if len(evidence.scan.tasks) > 1 else ():
        if any(tensor.rank):
            weights += tensor.numel
            # theta_s'theta_t = ||theta0||^2 + theta0'(tau_s + tau_t) + tau_s'tau_t
            dots = tensor.base_square + tensor.base_dots[:, None] + tensor.base_dots[None, :] + tensor.gram
            if float(tensor.cosine.max()) < KEPT <= float(similarity.cosines(dots).min()):
                strange += tensor.numel
    return strange > HALF * weights


def other_base(evidence: Evidence) -> Iterator[Cause]:
    """A model that was not fine-tuned from this base: its matrices are as good as orthogonal to the base's.

    Where that holds of all tasks, while they are close to one another, it is the base that is wrong.
    """
    matrices = {name: t for name, t in evidence.scan.tensors.items() if any(t.rank)}
    if wrong_base(evidence):
        cosine = max(float(t.cosine.max()) for t in matrices.values())
        yield cause(
            "other_base",
            "base",
            f"none of the {len(evidence.scan.tasks)} tasks resembles the base given (the largest cosine of a matrix is {cosine:.2f}), while "
            "they resemble one another: they were fine-tuned from another model",
            "give the model that they were fine-tuned from as the base (the very checkpoint, not another size, seed or step)",
            INPUT,
            cosine=cosine,
        )
        return
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
        moved = float(sum(judged[n].gram[position, position] for n in layers))
        ratio = math.sqrt(moved / max(1e-300, sum(judged[n].base_square for n in layers)))
        name = min(far, key=far.__getitem__)
        yield cause(
            "other_base",
            task,
            f"{'different beginnings: ' if whole else ''}{task!r} shares next to nothing with the base in {len(layers)} of {len(matrices)} matrices "
            f"(cosine {far[name]:.2f} in {name}; its task vector there is {ratio:.1f} times as long as the base's weights)",
            f"fine-tune {task!r} from this very base (same seed of new layers); models of different beginnings are merged after an "
            f"alignment: {align_command(evidence, task)}"
            if whole
            else f"leave {layer_group(name)} of {task!r} out of the merge, start all tasks from one initialisation of it, or, where it "
            f"should be the base's, save {task!r} again: it may be damaged",
            INPUT,
            saving_of(evidence, without, task),
            cosine=far[name],
            share=near / max(1, weights),
            length=ratio,
        )


def copied_layers(evidence: Evidence) -> Iterator[Cause]:
    """Two tasks with the very same fine-tuned values in some layers only: one wears the head of the other."""
    groups, tasks = evidence.scan.groups(), evidence.scan.tasks
    grams = {group: evidence.scan.gram(names) for group, names in groups.items()}
    for j, i in combinations(range(len(tasks)), 2):
        gaps = {
            group: (float(g[i, i] + g[j, j] - 2 * g[i, j]), float(g[i, i] + g[j, j]))
            for group, g in grams.items()
            if float(g[i, i]) or float(g[j, j])
        }
        same = [group for group, (gap, size) in gaps.items() if gap <= 1e-9 * size]
        if not same:
            continue
        names = [name for group in same for name in groups[group]]
        wearer, owner = _wearer(evidence, tasks[i], tasks[j], names)
        pair = f"{tasks[j]} and {tasks[i]}"
        if len(same) < len(gaps):
            what = (
                f"{wearer!r} holds the same values as that of {owner!r}"
                if owner
                else f"{pair} holds the same values"
            )
            yield cause(
                "head_of_another_task",
                wearer if owner else pair,
                f"{', '.join(same[:3])} of {what}, while their other layers differ",
                f"give {wearer!r} its own head, or keep each task's head beside the merged trunk",
                INPUT,
                saving_of(evidence, without, wearer, names),
                layers=float(len(same)),
            )
        else:
            yield cause(
                "same_model_twice",
                wearer if owner else pair,
                f"{tasks[j]!r} and {tasks[i]!r} are the same model",
                f"leave {wearer!r} out, or give the pair the weight of one",
                INPUT,
                layers=float(len(same)),
            )


def _wearer(evidence: Evidence, a: str, b: str, names: list[str]) -> tuple[str, str]:
    """(wearer, owner) of layers that two tasks share: the owner's own loss would miss them more, were they the base's.

    The owner is "" where data does not tell (the two losses within two standard errors of one another).
    """
    if not {a, b} <= evidence.losses.keys() & evidence.objectives.keys():
        return a, ""
    missed, errors = {}, []
    for task in (a, b):
        weights = {**evidence.tasks[task], **{name: evidence.base[name] for name in names}}
        difference = evidence.objectives[task].losses(weights) - evidence.losses[task][task]
        missed[task] = float(difference.mean())
        errors.append(error_of_mean(difference))
    wearer, owner = sorted((a, b), key=missed.__getitem__)
    return wearer, owner if missed[owner] - missed[wearer] > 2 * math.hypot(*errors) else ""
