"""Causes in how the merge was made: rounded away, made of other models, by another recipe, or not made at all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradmatch.diagnosis.cause import INPUT, Cause, cause
from gradmatch.diagnosis.repairs import exact, planned_update, saving_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradmatch.diagnosis.evidence import Evidence, Saving
    from gradmatch.diagnosis.scan import TensorScan

HALF = 0.5
# Rounding noise with a tenth of the update's energy: signal to noise of 10.
ROUNDING_SHARE = 0.1
# Energy of an update outside anything that reweighting the task vectors can make.
OUTSIDE = 0.5
# Energy by which a sum of task vectors may differ from the recipe's: an error of a tenth of its length, far above rounding.
OFF = 0.01


def rounded_away(evidence: Evidence) -> Iterator[Cause]:
    """An output dtype too coarse for the update: its rounding errors against the update's own energy."""
    tensors = evidence.scan.tensors.values()
    gridded = [t for t in tensors if t.grid]
    if (
        evidence.merged is None
        or not gridded
        or sum(t.numel for t in gridded) < HALF * sum(t.numel for t in tensors)
    ):
        return
    planned, rounding = planned_update(evidence), sum(t.rounding for t in tensors)
    if rounding < ROUNDING_SHARE * planned:
        return
    ratio = math.sqrt(rounding / max(planned, 1e-300))
    stored = math.sqrt(sum(t.delta_square for t in tensors))
    yield cause(
        "rounded_away",
        "merged",
        f"the merge is stored in {gridded[0].grid}, whose rounding errors are {ratio:.1f} times as large as the update that the weights "
        f"ask for (norm {math.sqrt(planned):.3g}; stored update {stored:.3g})",
        "write the merge in float32 (dtype: float32)",
        INPUT,
        saving_of(evidence, exact),
        ratio=ratio,
    )


def no_merge_of_these(evidence: Evidence) -> Iterator[Cause]:
    """A merged model whose update no weighting of these task vectors can make, or which is not what the recipe gives."""
    if evidence.merged is None or "merged" in evidence.scan.nonfinite:
        return
    model = one_model(evidence)
    if model:
        moved = ", ".join(repr(task) for task in _asked_for(evidence) if task != model)
        yield cause(
            "merge_is_one_model",
            model,
            f"every weight of the merge equals {model!r}'s: nothing of {moved} is in it",
            f"check the path of the merged model (it may be the folder of {model!r}), and merge again",
            INPUT,
            _as_asked(evidence),
        )
        return
    tensors = evidence.scan.tensors
    rounding = sum(t.rounding for t in tensors.values())
    outside = max(0.0, sum(t.outside for t in tensors.values()) - rounding)
    update = sum(t.delta_square for t in tensors.values())
    if update == 0 or outside < OUTSIDE * update:
        yield from other_recipe(evidence)
        return
    layers = evidence.scan.groups()
    energy = {
        layer: [sum(getattr(tensors[n], kind) for n in names) for kind in ("outside", "delta_square")]
        for layer, names in layers.items()
    }
    stray = [layer for layer, (beyond, whole) in energy.items() if beyond > OUTSIDE * whole > 0]
    confined = len(layers) > 1 and len(stray) <= len(layers) / 4
    yield cause(
        "no_merge_of_these",
        "merged",
        f"{outside / update:.0%} of the merge's update lies where no weighting of these task vectors reaches"
        + (f", all of it in {', '.join(stray[:3])}" if confined else ""),
        f"merge again: {stray[0]} of the merged model is damaged, or comes from another model"
        if confined
        else "check the paths: the merged model, the base and the tasks do not belong together",
        INPUT,
        _as_asked(evidence),
        outside=outside / update,
        layers=float(len(stray)),
    )


def _as_asked(evidence: Evidence) -> Saving | None:
    """What the recipe's own sum saves, where it is one."""
    return saving_of(evidence, exact) if evidence.exact else None


def _asked_for(evidence: Evidence) -> list[str]:
    """Tasks that moved, with a weight."""
    return [task for task, norm in evidence.scan.norms().items() if norm > 0 and evidence.alpha[task] != 0]


def one_model(evidence: Evidence) -> str | None:
    """The model that the merge is, weight by weight: the base, or one of several tasks; None where it is none of them.

    Then the folder is the wrong one, or no merge was ever written there. Soups may choose one model; a recipe whose other weights are zero asks for one.
    """
    scan = evidence.scan
    known = [t for t in scan.tensors.values() if t.products is not None]
    moved = _asked_for(evidence)
    if not known or not moved or evidence.searched:
        return None
    storage = 4 * sum(t.storage for t in known)
    gram = scan.gram()
    if storage > min(float(gram[p, p]) for p in map(scan.tasks.index, moved)):
        return None  # in this precision everything may look like the base: see rounded_away
    gaps = {"base": sum(t.delta_square for t in known)}
    for p, task in enumerate(scan.tasks):
        apart = [float(gram[p, p] - 2 * gram[p, q] + gram[q, q]) for q in map(scan.tasks.index, moved)]
        if task in moved and max(apart) > storage + 1e-9 * float(gram[p, p]):
            products = sum(float(t.products[p]) for t in known if t.products is not None)
            gaps[task] = gaps["base"] - 2 * products + float(gram[p, p])
    model = min(gaps, key=gaps.__getitem__)
    least = 0.0 if model == "base" else storage + 1e-9 * gaps["base"]
    return model if gaps[model] <= least else None


def other_recipe(evidence: Evidence) -> Iterator[Cause]:
    """A merge that is not sum_t alpha_t tau_t although its recipe says so: made by other weights, or of other versions of the models.

    Tensors that a policy took from one model as they are (the base's, a task's) do not count.
    """
    scan = evidence.scan
    alpha = torch.tensor([evidence.alpha[task] for task in scan.tasks], dtype=torch.float64)
    made = {n: t for n, t in scan.tensors.items() if t.products is not None and not _taken(t)}
    planned = float(alpha @ scan.gram(made) @ alpha)
    update = sum(t.delta_square for t in made.values())
    products = sum(float(alpha @ t.products) for t in made.values() if t.products is not None)
    off = update - 2 * products + planned
    storage = sum(t.storage for t in made.values())
    if not evidence.exact or off <= OFF * max(update, planned) + 4 * storage:
        return
    used, residual = scan.projection(made)
    spanned = residual < max(OFF, 4 * storage / max(update, 1e-300))
    listed = ", ".join(
        f"{task} {used[task]:.3g} (recipe: {evidence.alpha[task]:.3g})" for task in scan.tasks[:6]
    )
    yield cause(
        "other_recipe",
        "merged",
        f"the merge is of these models, with other weights than the recipe's: {listed}"
        if spanned
        else f"{residual:.0%} of the merge's update lies outside the span of the task vectors, where {evidence.method} cannot lead: "
        "it was made of other versions of these models",
        "merge again, or diagnose it with the recipe that it was made by",
        INPUT,
        saving_of(evidence, exact),
        off=off / max(update, planned),
        residual=residual,
    )


def _taken(tensor: TensorScan) -> bool:
    """Whether the merge holds the base's tensor, or one task's, as it is."""
    assert tensor.products is not None
    gaps = tensor.delta_square - 2 * tensor.products + tensor.gram.diagonal()
    nothing = 1e-9 * tensor.delta_square + 4 * tensor.storage
    return tensor.delta_square == 0 or bool((gaps <= nothing).any())
