"""Causes in what goes with the models: labels, curvatures, the output's dtype, the folder that was meant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradmatch.diagnosis import health
from gradmatch.diagnosis.causes import INPUT, Cause, Finder, priced
from gradmatch.diagnosis.evidence import accuracy_of, accuracy_of_rows, best_relabelling
from gradmatch.diagnosis.repairs import averaged, exact, planned_update, saving_of, saving_of_others

if TYPE_CHECKING:
    from gradmatch.diagnosis.evidence import Evidence

HALF = 0.5
# Rounding noise with a tenth of the update's energy: signal to noise of 10.
ROUNDING_SHARE = 0.1
# Standard error of half the estimate's norm: a quarter of its energy is noise. sqrt(2 / n) reaches it at 8 examples.
NOISE = 0.5
# Energy of an update outside anything that reweighting the task vectors can make.
OUTSIDE = 0.5


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
                    *priced(saving_of(evidence, averaged) if evidence.uses_curvature else None),
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
    relabelled,
    curvature_of_another,
    noisy_curvature,
    rounded_away,
    no_merge_of_these,
    zero_tensors,
)
