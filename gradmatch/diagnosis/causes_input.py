"""Causes in what goes with the models: labels, curvatures, the output's dtype, the folder that was meant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradmatch.diagnosis.cause import INPUT, Cause, Finder, priced
from gradmatch.diagnosis.evidence import accuracy_of, accuracy_of_rows, best_relabelling
from gradmatch.diagnosis.repairs import averaged, exact, planned_update, restored, saving_of, saving_of_others
from gradmatch.measure import health

if TYPE_CHECKING:
    from gradmatch.diagnosis.evidence import Evidence
    from gradmatch.diagnosis.scan import TensorScan

HALF = 0.5
# Rounding noise with a tenth of the update's energy: signal to noise of 10.
ROUNDING_SHARE = 0.1
# Standard error of half the estimate's norm: a quarter of its energy is noise. sqrt(2 / n) reaches it at 8 examples.
NOISE = 0.5
# Energy of an update outside anything that reweighting the task vectors can make.
OUTSIDE = 0.5
# Energy by which a sum of task vectors may differ from the recipe's: an error of a tenth of its length, far above rounding.
OFF = 0.01


def relabelled(evidence: Evidence) -> list[Cause]:
    """A task whose classes carry other numbers: the other models are wrong on its data until they are renamed."""
    causes = []
    for task in evidence.objectives:
        own = evidence.confusions.get(task, {}).get(task)
        others = [m for m in ("base", *evidence.other_tasks(task)) if task in evidence.confusions.get(m, {})]
        if own is None or len(own) < 2 or not others:
            continue
        pooled = torch.stack([evidence.confusions[m][task] for m in others]).sum(0)
        renaming, _ = best_relabelling(pooled)
        moved = [label for predicted, label in enumerate(renaming) if predicted != label]
        if not moved:
            continue
        # On the examples of the renamed classes (the others are right or wrong either way), renamed predictions must come at least
        # half-way from chance to what the task's own model reaches, and most of that must be due to the renaming, beyond
        # the noise of n examples (4 standard errors: the best of many renamings).
        plain, chance = accuracy_of_rows(pooled, moved), 1 / len(pooled)
        renamed = accuracy_of_rows(pooled[:, [renaming.index(label) for label in range(len(pooled))]], moved)
        error = math.sqrt(0.25 / max(1.0, float(own[moved].sum())))
        reaches = renamed - chance > HALF * (accuracy_of_rows(own, moved) - chance)
        convincing = reaches and renamed - plain > max(HALF * (renamed - chance), 4 * error)
        agreed = all(best_relabelling(evidence.confusions[m][task])[0] == renaming for m in others)
        noise = math.sqrt(0.25 / max(1.0, float(own.sum())))
        fits_itself = accuracy_of(own) >= best_relabelling(own)[1] - noise
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
                    f"on the data of {task!r} in these classes the other models are right in {plain:.0%}, and in {renamed:.0%} after renaming {moves}",
                    f"rename the classes of {task!r} (permute the rows of its head, or map its labels and train again)",
                    INPUT,
                    *priced(saving_of_others(evidence, task)),
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
                *priced(saving_of(evidence, averaged) if evidence.uses_curvature else None),
            )
        )
    return causes


def curvature_units(evidence: Evidence) -> list[Cause]:
    """Curvatures of different sizes, so that the rule weighs units and not tasks."""
    if not evidence.uses_curvature:
        return []
    return [
        Cause(
            "curvature_units",
            apart.smaller,
            apart.text,
            f"estimate both in the same way, with `gradmatch estimate` on data of {apart.smaller!r} and of {apart.larger!r}",
            INPUT,
            *priced(saving_of(evidence, averaged)),
            {"ratio": apart.ratio},
        )
        for apart in evidence.units
    ]


def noisy_curvature(evidence: Evidence) -> list[Cause]:
    """A curvature too noisy to weigh with: from a handful of examples, or of many with heavy tails where that costs something.

    A few gradients dominate the Fisher of a confident model whatever their number; most of that noise scales a whole model alike, and
    merges bear it. So there the losses decide; without them it is a note.
    """
    causes = []
    given = dict(evidence.curvatures)
    base = evidence.base_curvature
    if base is not None and not isinstance(base, int | float):
        given["base"] = base
    for whose, curvature in given.items():
        noise = health.fisher_noise(curvature)
        if noise is None or noise < NOISE:
            continue
        seen = curvature.info.get("examples_seen", "?")
        saving = saving_of(evidence, averaged) if evidence.uses_curvature else None
        text = f"the curvature of {whose!r} comes from {seen} examples: its standard error is {noise:.0%} of its size"
        enough = 500
        if seen.isdecimal() and (2 / max(1, int(seen))) ** 0.5 < NOISE:
            if saving is None or not evidence.matters(saving):
                if evidence.uses_curvature:
                    evidence.notes.append(f"{text} (a few of them dominate it)")
                continue
            enough = max(enough, round_up(int(seen) * (noise / (NOISE / 2)) ** 2))
        causes.append(
            Cause(
                "noisy_curvature",
                whose,
                text,
                f"estimate it from about {enough:,} examples or more (`gradmatch estimate --examples {enough}`)",
                INPUT,
                *priced(saving),
                {"noise": noise},
            )
        )
    return causes


def round_up(value: float) -> int:
    """To one figure: 1,312 -> 2,000."""
    power = int(10 ** math.floor(math.log10(value)))
    return math.ceil(value / power) * power


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
    planned = planned_update(evidence)
    if rounding < ROUNDING_SHARE * planned:
        return []
    saving = saving_of(evidence, exact)
    return [
        Cause(
            "rounded_away",
            "merged",
            f"the merge is stored in {grid}, whose rounding errors are {math.sqrt(rounding / max(planned, 1e-300)):.1f} times as large as the "
            f"update that the weights ask for (norm {math.sqrt(planned):.3g}; stored update {math.sqrt(update):.3g})",
            "write the merge in float32 (dtype: float32)",
            INPUT,
            *priced(saving),
            {"ratio": math.sqrt(rounding / max(planned, 1e-300))},
        )
    ]


def no_merge_of_these(evidence: Evidence) -> list[Cause]:
    """A merged model whose update no weighting of these task vectors can make, or which is not what the recipe gives."""
    if evidence.merged is None or "merged" in evidence.scan.nonfinite:
        return []
    unmixed = one_model(evidence)
    if unmixed:
        return unmixed
    tensors = evidence.scan.tensors
    rounding = sum(t.rounding for t in tensors.values())
    outside = max(0.0, sum(t.outside for t in tensors.values()) - rounding)
    update = sum(t.delta_square for t in tensors.values())
    if update == 0 or outside < OUTSIDE * update:
        return other_recipe(evidence)
    layers = evidence.scan.groups()
    stray = [
        layer for layer, names in layers.items()
        if sum(tensors[n].outside for n in names) > OUTSIDE * sum(tensors[n].delta_square for n in names) > 0
    ]  # fmt: skip
    confined = len(layers) > 1 and len(stray) <= len(layers) / 4
    return [
        Cause(
            "no_merge_of_these",
            "merged",
            f"{outside / update:.0%} of the merge's update lies where no weighting of these task vectors reaches"
            + (f", all of it in {', '.join(stray[:3])}" if confined else ""),
            f"merge again: {stray[0]} of the merged model is damaged, or comes from another model"
            if confined
            else "check the paths: the merged model, the base and the tasks do not belong together",
            INPUT,
            *priced(saving_of(evidence, exact) if evidence.exact else None),
            {"outside": outside / update, "layers": float(len(stray))},
        )
    ]


def one_model(evidence: Evidence) -> list[Cause]:
    """A merged model that is the base, or one of several tasks, as it is: the wrong folder, or a merge that was never written there.

    Soups may choose one model; a recipe whose other weights are zero asks for one.
    """
    scan = evidence.scan
    known = [t for t in scan.tensors.values() if t.products is not None]
    moved = [task for task, norm in scan.norms().items() if norm > 0 and evidence.alpha[task] != 0]
    if not known or not moved or evidence.searched:
        return []
    storage = 4 * sum(t.storage for t in known)
    gram = scan.gram()
    if storage > min(float(gram[p, p]) for p in map(scan.tasks.index, moved)):
        return []  # in this precision everything may look like the base: see rounded_away
    gaps = {"base": sum(t.delta_square for t in known)}
    for p, task in enumerate(scan.tasks):
        apart = [float(gram[p, p] - 2 * gram[p, q] + gram[q, q]) for q in map(scan.tasks.index, moved)]
        if task in moved and max(apart) > storage + 1e-9 * float(gram[p, p]):
            products = sum(float(t.products[p]) for t in known if t.products is not None)
            gaps[task] = gaps["base"] - 2 * products + float(gram[p, p])
    model = min(gaps, key=gaps.__getitem__)
    least = 0.0 if model == "base" else storage + 1e-9 * gaps["base"]
    if gaps[model] > least:
        return []
    return [
        Cause(
            "merge_is_one_model",
            model,
            f"every weight of the merge equals {model!r}'s: nothing of {', '.join(repr(t) for t in moved if t != model)} is in it",
            f"check the path of the merged model (it may be the folder of {model!r}), and merge again",
            INPUT,
            *priced(saving_of(evidence, exact) if evidence.exact else None),
        )
    ]


def other_recipe(evidence: Evidence) -> list[Cause]:
    """A merge that is not sum_t alpha_t tau_t although its recipe says so: made by other weights, or of other versions of the models.

    Tensors that a policy took from one model as they are (the base's, a task's) do not count.
    """
    if not evidence.exact:
        return []
    scan = evidence.scan
    alpha = torch.tensor([evidence.alpha[task] for task in scan.tasks], dtype=torch.float64)
    made = [name for name, t in scan.tensors.items() if t.products is not None and not _taken(t)]
    off = sum(
        t.delta_square - 2 * float(alpha @ t.products) + float(alpha @ t.gram @ alpha)
        for t in (scan.tensors[name] for name in made)
        if t.products is not None
    )
    update = sum(scan.tensors[name].delta_square for name in made)
    planned = float(alpha @ scan.gram(made) @ alpha)
    storage = sum(scan.tensors[name].storage for name in made)
    if off <= OFF * max(update, planned) + 4 * storage:
        return []
    used, residual = scan.projection(made)
    spanned = residual < max(OFF, 4 * storage / max(update, 1e-300))
    listed = ", ".join(
        f"{task} {used[task]:.3g} (recipe: {evidence.alpha[task]:.3g})" for task in scan.tasks[:6]
    )
    return [
        Cause(
            "other_recipe",
            "merged",
            f"the merge is of these models, with other weights than the recipe's: {listed}"
            if spanned
            else f"{residual:.0%} of the merge's update lies outside the span of the task vectors, where {evidence.method} cannot lead: "
            "it was made of other versions of these models",
            "merge again, or diagnose it with the recipe that it was made by",
            INPUT,
            *priced(saving_of(evidence, exact)),
            {"off": off / max(update, planned), "residual": residual},
        )
    ]


def _taken(tensor: TensorScan) -> bool:
    """Whether the merge holds the base's tensor, or one task's, as it is."""
    assert tensor.products is not None
    gaps = tensor.delta_square - 2 * tensor.products + tensor.gram.diagonal()
    nothing = 1e-9 * tensor.delta_square + 4 * tensor.storage
    return tensor.delta_square == 0 or bool((gaps <= nothing).any())


def zero_tensors(evidence: Evidence) -> list[Cause]:
    """Weights that are zero everywhere in a model while the base's are not: lost in saving or loading."""
    return [
        Cause(
            "zero_tensor",
            model,
            f"{len(names)} tensor{'s' if len(names) > 1 else ''} of {model!r} {'are' if len(names) > 1 else 'is'} zero everywhere, "
            f"{names[0]} among them; the base's {'are' if len(names) > 1 else 'is'} not",
            f"fetch or save {model!r} again",
            INPUT,
            *priced(saving_of(evidence, restored, model, names)),
            {"tensors": float(len(names))},
        )
        for model, names in evidence.scan.zeros.items()
    ]


INPUT_FINDERS: tuple[Finder, ...] = (
    relabelled,
    curvature_of_another,
    curvature_units,
    noisy_curvature,
    rounded_away,
    no_merge_of_these,
    zero_tensors,
)
