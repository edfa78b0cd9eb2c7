"""Causes in the inputs: values that are broken, models and curvatures that are not what they claim to be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.diagnosis import health
from gradmatch.diagnosis.causes import BROKEN, INPUT, Cause, Finder, priced
from gradmatch.diagnosis.evidence import accuracy_of, best_relabelling
from gradmatch.diagnosis.layers import layer_group

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from gradmatch.diagnosis.evidence import Evidence, Saving

HALF = 0.5
# At a cosine of 1/sqrt(2) as much of a tensor is new as is kept: below, it is nearer to an unrelated one than to the base.
KEPT = math.sqrt(0.5)
# A few layers may drift far in long training; only independent ones come near to orthogonal.
UNRELATED = 0.25
# Rounding noise with a tenth of the update's energy: signal to noise of 10.
ROUNDING_SHARE = 0.1
# Standard error of half the estimate's norm: a quarter of its energy is noise. sqrt(2 / n) reaches it at 8 examples.
NOISE = 0.5
# Energy of an update outside anything that reweighting the task vectors can make.
OUTSIDE = 0.5


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
                saving = _saving(evidence, _rolled, task, name, offset)
                text = f"most rows of {name} in {task!r} equal the base's rows {abs(offset)} place{'s' if abs(offset) > 1 else ''} {'later' if offset > 0 else 'earlier'}"
                remedy = "align the vocabularies (map tokens by their text) before merging"
            else:
                saving = _saving(evidence, _without, task)
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
                *priced(_saving(evidence, _without, task)),
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
            saving = _saving(evidence, _without, wearer, names) if different else None
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


def relabelled(evidence: Evidence) -> list[Cause]:
    """A task whose classes carry other numbers: the other models are wrong on its data until they are renamed."""
    causes = []
    for task in evidence.objectives:
        own = evidence.confusions.get(task, {}).get(task)
        others = [m for m in ("base", *evidence.other_tasks(task)) if task in evidence.confusions.get(m, {})]
        if own is None or len(own) < 2 or not others:
            continue
        pooled = torch.stack([evidence.confusions[m][task] for m in others]).sum(0)
        renaming, renamed = best_relabelling(pooled)
        plain, chance = accuracy_of(pooled), 1 / len(pooled)
        # Renamed, the others must come at least half-way from chance to what the task's own model reaches, and most of that
        # must be due to the renaming, beyond the noise of n examples (4 standard errors: the best of many renamings).
        error = math.sqrt(0.25 / max(1.0, float(own.sum())))
        reaches = renamed - chance > HALF * (accuracy_of(own) - chance)
        convincing = reaches and renamed - plain > max(HALF * (renamed - chance), 4 * error)
        agreed = all(best_relabelling(evidence.confusions[m][task])[0] == renaming for m in others)
        fits_itself = accuracy_of(own) >= best_relabelling(own)[1] - error
        others_fit = all(
            best_relabelling(evidence.confusions[m][m])[0] == list(range(len(own)))
            for m in others
            if m in evidence.confusions[m]
        )
        if convincing and agreed and fits_itself and others_fit:
            moves = ", ".join(f"{k} -> {label}" for k, label in enumerate(renaming) if k != label)
            causes.append(
                Cause(
                    "labels_swapped",
                    task,
                    f"on the data of {task!r} the other models are right in {plain:.0%}, and in {renamed:.0%} after renaming classes {moves}",
                    f"rename the classes of {task!r} (permute the rows of its head, or map its labels and train again)",
                    INPUT,
                    *priced(_saving_of_others(evidence, task)),
                    {"plain": plain, "renamed": renamed},
                )
            )
    return causes


def curvature_of_another(evidence: Evidence) -> list[Cause]:
    """A curvature that was taken at other weights than those of its model."""
    causes = []
    for whose, found in evidence.fingerprints.items():
        if found == whose:
            continue
        causes.append(
            Cause(
                "curvature_of_another_model",
                whose,
                f"the curvature of {whose!r} was taken at the weights of {found!r}"
                if found
                else f"the curvature of {whose!r} was taken at weights of none of these models",
                f"estimate it at the weights of {whose!r}, with its data",
                INPUT,
                *priced(_saving(evidence, _averaged) if evidence.uses_curvature else None),
            )
        )
    return causes


def noisy_curvature(evidence: Evidence) -> list[Cause]:
    """A curvature from too few examples to weigh anything with."""
    causes = []
    given = dict(evidence.curvatures)
    base = evidence.base_curvature
    if base is not None and not isinstance(base, int | float):
        given["base"] = base
    for whose, curvature in given.items():
        noise = health.fisher_noise(curvature)
        if noise is not None and noise >= NOISE:
            seen = curvature.info.get("examples_seen", "?")
            causes.append(
                Cause(
                    "noisy_curvature",
                    whose,
                    f"the curvature of {whose!r} comes from {seen} examples: its standard error is {noise:.0%} of its size",
                    "estimate it from a few hundred examples or more (`gradmatch estimate --examples 500`)",
                    INPUT,
                    *priced(_saving(evidence, _averaged) if evidence.uses_curvature else None),
                    {"noise": noise},
                )
            )
    return causes


def rounded_away(evidence: Evidence) -> list[Cause]:
    """An output dtype too coarse for the update: its rounding errors against the update's own energy."""
    if evidence.merged is None:
        return []
    rounding = sum(t.rounding for t in evidence.scan.tensors.values())
    update = sum(t.delta_square for t in evidence.scan.tensors.values())
    gridded = sum(t.numel for t in evidence.scan.tensors.values() if t.grid)
    weights = sum(t.numel for t in evidence.scan.tensors.values())
    if gridded < HALF * weights:
        return []
    grid = next(t.grid for t in evidence.scan.tensors.values() if t.grid)
    exact = _planned_update(evidence)
    if rounding < ROUNDING_SHARE * exact:
        return []
    saving = _saving(evidence, _exact)
    return [
        Cause(
            "rounded_away",
            "merged",
            f"the merge is stored in {grid}, whose rounding errors are {math.sqrt(rounding / max(exact, 1e-300)):.1f} times as large as the "
            f"update that the weights ask for (norm {math.sqrt(exact):.3g}; stored update {math.sqrt(update):.3g})",
            "write the merge in float32 (dtype: float32)",
            INPUT,
            *priced(saving),
            {"ratio": math.sqrt(rounding / max(exact, 1e-300))},
        )
    ]


def no_merge_of_these(evidence: Evidence) -> list[Cause]:
    """A merged model whose update no weighting of these task vectors can make."""
    if evidence.merged is None or "merged" in evidence.scan.nonfinite:
        return []
    rounding = sum(t.rounding for t in evidence.scan.tensors.values())
    outside = max(0.0, sum(t.outside for t in evidence.scan.tensors.values()) - rounding)
    update = sum(t.delta_square for t in evidence.scan.tensors.values())
    if update == 0 or outside < OUTSIDE * update:
        return []
    return [
        Cause(
            "no_merge_of_these",
            "merged",
            f"{outside / update:.0%} of the merge's update lies where no weighting of these task vectors reaches",
            "check the paths: the merged model, the base and the tasks do not belong together",
            INPUT,
            None,
            "",
            {"outside": outside / update},
        )
    ]


def zero_tensors(evidence: Evidence) -> list[Cause]:
    """Weights that are zero everywhere in a model while the base's are not: lost in saving or loading."""
    return [
        Cause(
            "zero_tensor",
            model,
            f"{len(names)} tensors of {model!r} are zero everywhere, {names[0]} among them; the base's are not",
            f"fetch or save {model!r} again",
            INPUT,
            None,
            "",
            {"tensors": float(len(names))},
        )
        for model, names in evidence.scan.zeros.items()
    ]


INPUT_FINDERS: tuple[Finder, ...] = (
    not_finite,
    shapes_differ,
    rows_moved,
    other_base,
    copied_layers,
    relabelled,
    curvature_of_another,
    noisy_curvature,
    rounded_away,
    no_merge_of_these,
    zero_tensors,
)


def _saving(
    evidence: Evidence, repair: Callable[..., Mapping[str, Tensor]], *arguments: Any
) -> Saving | None:
    """What a repair saves, where losses can be measured."""
    return evidence.saving(repair(evidence, *arguments)) if evidence.measured else None


def _saving_of_others(evidence: Evidence, task: str) -> Saving | None:
    """What the other tasks save without this one; its own data carries other labels and does not count."""
    others = [other for other in evidence.objectives if other != task]
    return evidence.saving(_without(evidence, task), others) if evidence.measured else None


def _without(evidence: Evidence, task: str, names: list[str] | None = None) -> dict[str, Tensor]:
    """The merge without a task's share: theta - c_t tau_t, in all tensors or some."""
    c = evidence.coefficients()[task]
    removed = evidence.with_changes({task: -c})
    if names is None:
        return removed
    assert evidence.merged is not None
    return {name: removed[name] if name in names else evidence.merged[name] for name in evidence.merged}


def _rolled(evidence: Evidence, task: str, name: str, offset: int) -> dict[str, Tensor]:
    """The merge with a task's rows of one tensor put back by `offset`: theta + c_t (roll(theta_t) - theta_t)."""
    assert evidence.merged is not None
    theta = evidence.tasks[task][name].float()
    c = evidence.coefficients()[task]
    put_back = theta.roll(offset, 0) - theta
    return {**evidence.merged, name: evidence.merged[name].float() + c * put_back}


def _averaged(evidence: Evidence) -> dict[str, Tensor]:
    """Plain averaging: what needs no curvature."""
    return evidence.at_coefficients(dict.fromkeys(evidence.tasks, 1 / len(evidence.tasks)))


def _exact(evidence: Evidence) -> dict[str, Tensor]:
    """theta0 + sum_t alpha_t tau_t in float32: what was asked for, unrounded."""
    return evidence.at_coefficients(evidence.alpha)


def _planned_update(evidence: Evidence) -> float:
    """||sum_t alpha_t tau_t||^2: the update that the weights ask for."""
    alpha = torch.tensor([evidence.alpha[task] for task in evidence.scan.tasks], dtype=torch.float64)
    return float(alpha @ evidence.scan.gram() @ alpha)


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
