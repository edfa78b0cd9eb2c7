"""Causes in what goes with the models: labels and curvatures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradmatch.diagnosis.cause import INPUT, Cause, cause
from gradmatch.diagnosis.evidence import accuracy_of, accuracy_of_rows, best_relabelling
from gradmatch.diagnosis.repairs import averaged, saving_of, saving_of_others
from gradmatch.estimators.curvature import Curvature
from gradmatch.measure import health

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradmatch.diagnosis.evidence import Evidence

HALF = 0.5
# Standard error of half the estimate's norm: a quarter of its energy is noise. sqrt(2 / n) reaches it at 8 examples.
NOISE = 0.5


def relabelled(evidence: Evidence) -> Iterator[Cause]:
    """A task whose classes carry other numbers: the other models are wrong on its data until they are renamed."""
    confusions = evidence.confusions
    for task in evidence.objectives:
        own = confusions.get(task, {}).get(task)
        others = [m for m in ("base", *evidence.other_tasks(task)) if task in confusions.get(m, {})]
        if own is None or len(own) < 2 or not others:
            continue
        pooled = torch.stack([confusions[m][task] for m in others]).sum(0)
        renaming, _ = best_relabelling(pooled)
        moved = [label for predicted, label in enumerate(renaming) if predicted != label]
        if not moved:
            continue
        # On the examples of the renamed classes (the others are right or wrong either way), renamed predictions must come at least
        # half-way from chance to what the task's own model reaches, and most of that must be due to the renaming, beyond
        # the noise of n examples (4 standard errors: the best of many renamings).
        plain, chance = accuracy_of_rows(pooled, moved), 1 / len(pooled)
        renamed = accuracy_of_rows(pooled[:, [renaming.index(label) for label in range(len(pooled))]], moved)
        error, noise = (math.sqrt(0.25 / max(1.0, float(rows.sum()))) for rows in (own[moved], own))
        convincing = (
            renamed - chance > HALF * (accuracy_of_rows(own, moved) - chance)
            and renamed - plain > max(HALF * (renamed - chance), 4 * error)
            and all(best_relabelling(confusions[m][task])[0] == renaming for m in others)
        )
        fits_itself = accuracy_of(own) >= best_relabelling(own)[1] - noise
        others_fit = all(
            best_relabelling(confusions[m][m])[0] == list(range(len(own)))
            for m in others
            if m in confusions[m]
        )
        if convincing and fits_itself and others_fit:
            moves = ", ".join(f"{k} -> {label}" for k, label in enumerate(renaming) if k != label)
            yield cause(
                "labels_swapped",
                task,
                f"on the data of {task!r} in these classes the other models are right in {plain:.0%}, and in {renamed:.0%} after "
                f"renaming {moves}",
                f"rename the classes of {task!r} (permute the rows of its head, or map its labels and train again)",
                INPUT,
                saving_of_others(evidence, task),
                plain=plain,
                renamed=renamed,
            )


def curvature_of_another(evidence: Evidence) -> Iterator[Cause]:
    """A curvature that was taken at other weights than those of its model."""
    for whose, found in evidence.fingerprints.items():
        if found != whose:
            yield cause(
                "curvature_of_another_model",
                whose,
                f"the curvature of {whose!r} was taken at "
                + (f"the weights of {found!r}" if found else "weights of none of these models"),
                f"estimate it at the weights of {whose!r}, with its data",
                INPUT,
                saving_of(evidence, averaged) if evidence.uses_curvature else None,
            )


def curvature_units(evidence: Evidence) -> Iterator[Cause]:
    """Curvatures of different sizes, so that the rule weighs units and not tasks."""
    for apart in evidence.units if evidence.uses_curvature else ():
        yield cause(
            "curvature_units",
            apart.smaller,
            apart.text,
            f"estimate both in the same way, with `gradmatch estimate` on data of {apart.smaller!r} and of {apart.larger!r}",
            INPUT,
            saving_of(evidence, averaged),
            ratio=apart.ratio,
        )


def noisy_curvature(evidence: Evidence) -> Iterator[Cause]:
    """A curvature too noisy to weigh with: from a handful of examples, or of many with heavy tails where that costs something.

    A few gradients dominate the Fisher of a confident model whatever their number; most of that noise scales a whole model alike, and
    merges bear it. So there the losses decide; without them it is a note.
    """
    base = evidence.base_curvature
    given = {**evidence.curvatures, **({"base": base} if isinstance(base, Curvature) else {})}
    for whose, curvature in given.items():
        noise = health.fisher_noise(curvature)
        if noise is None or noise < NOISE:
            continue
        seen = curvature.info.get("examples_seen", "?")
        measured = evidence.measured and evidence.uses_curvature
        saving = evidence.saving(averaged(evidence)) if measured else None
        text = f"the curvature of {whose!r} comes from {seen} examples: its standard error is {noise:.0%} of its size"
        enough = 500
        if seen.isdecimal() and (2 / max(1, int(seen))) ** 0.5 < NOISE:
            if saving is None or not evidence.matters(saving):
                if evidence.uses_curvature:
                    evidence.notes.append(f"{text} (a few of them dominate it)")
                continue
            enough = max(enough, round_up(int(seen) * (noise / (NOISE / 2)) ** 2))
        yield cause(
            "noisy_curvature",
            whose,
            text,
            f"estimate it from about {enough:,} examples or more (`gradmatch estimate --examples {enough}`)",
            INPUT,
            saving,
            noise=noise,
        )


def round_up(value: float) -> int:
    """To one figure: 1,312 -> 2,000."""
    power = int(10 ** math.floor(math.log10(value)))
    return math.ceil(value / power) * power
