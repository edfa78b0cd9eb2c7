"""What a mixture does not keep of its experts: differences outside of what is mixed, and settings of a config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradmatch.common.warning import warn
from gradmatch.mixture.sources import SILENT, Sources, held
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.stores import spans, take

SPAN = 2**22  # elements that are compared at a time


def config_notes(sources: Sources) -> Iterator[str]:
    """Settings of a config in which an expert differs from the base, whose setting holds."""
    theirs = sources.base.config or {}
    for expert in sources.experts:
        own = expert.model.config or {}
        for key in sorted({*theirs, *own} - SILENT):
            if key in theirs and key in own and theirs[key] != own[key] and key != "vocab_size":
                yield f"{expert.name}: {key} is {own[key]!r}, in the mixture it is the base's {theirs[key]!r}"


def losses(
    sources: Sources, merged: Checkpoint, outside: Sequence[str], inside: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What the mixture does not keep of each expert, and what it keeps.

    Returns:
        Expert -> {"mixed": norm of its difference to the base in what is mixed, "lost": norm of its difference to what is written
        outside, "share": lost / norm of its whole difference to the base, "most": the tensor that loses most}.
    """
    told = {}
    for expert in sources.experts:
        kept = math.sqrt(sum(_square(expert.model, sources.base, name) for name in inside))
        lost, whole, most = 0.0, kept**2, ("", 0.0)
        for name in outside:
            if not sources.base.spec(name).floating or name not in expert.model:
                continue
            own = _square(expert.model, sources.base, name)
            square = own if merged.store is sources.base.store else _square(expert.model, merged, name)
            lost, whole = lost + square, whole + own
            most = max(most, (name, square), key=lambda one: one[1])
        told[expert.name] = {
            "mixed": kept,
            "lost": math.sqrt(lost),
            "share": math.sqrt(lost / whole) if whole else 0.0,
            "most": most[0],
        }
    return told


def _square(one: Checkpoint, other: Checkpoint, name: str) -> float:
    """Sum of squared differences of a tensor of two models; of each span in float32."""
    total = 0.0
    for first, last in spans(one.spec(name).numel, SPAN):
        here, there = (take(model.store, held(model, name), first, last).float() for model in (one, other))
        apart = here - there  # not in place: what is taken may be the model's own memory
        total += float(apart.dot(apart))
    return total


def told_losses(table: Mapping[str, Mapping[str, Any]], level: str) -> list[str]:
    """Sentences on what is lost, and a warning of experts whose place is wasted."""
    notes = []
    for name, found in table.items():
        if found["lost"]:
            notes.append(
                f"{name}: outside the {level}s its weights are {found['lost']:.4g} (2-norm, {found['share']:.0%} of its difference to the base) "
                f"away from what is written, most in {found['most']}"
            )
        if not found["mixed"]:
            notes.append(f"{name} equals the base in every {level} that is mixed: its place is wasted")
            warn(notes[-1])
    return notes
