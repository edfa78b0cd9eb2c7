"""Which whole models can answer together: one kind of answer, one vocabulary, the same labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.building import family_of
from gradmatch.models.checkpoint import Checkpoint
from gradmatch.models.tokenizers import check_tokenizers


def predicts(model: Checkpoint) -> bool:
    """Whether a model answers at every position."""
    return family_of(model) in ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")


def plain_config(model: Checkpoint) -> dict[str, Any]:
    """A config as JSON has it."""
    content: dict[str, Any] = json.loads(json.dumps(dict(model.config or {}), default=str))
    return content


def check_answers(base: Checkpoint, model: Checkpoint, name: str) -> None:
    """Refuse whole models that do not read and answer alike.

    Raises:
        GradmatchError: another kind of answer, other labels or another vocabulary; both are named.
    """
    text = {"LMHeadModel": "ForCausalLM"}
    kinds = [text.get(family_of(one), family_of(one)) for one in (base, model)]
    if kinds[0] != kinds[1]:
        raise GradmatchError(
            f"{name} is a model {kinds[1] or 'without a head'}, the base one {kinds[0]}; whole models are mixed where they answer alike",
            "models_differ",
            name,
        )
    ours, theirs = plain_config(base), plain_config(model)
    if kinds[0] in ("ForCausalLM", "ForMaskedLM") and ours.get("vocab_size") != theirs.get("vocab_size"):
        raise GradmatchError(
            f"{name} has a vocabulary of {theirs.get('vocab_size')}, the base one of {ours.get('vocab_size')}; give models of one vocabulary",
            "vocabulary",
            name,
        )
    try:
        check_tokenizers(base, model)
    except ValueError as error:
        raise GradmatchError(f"{name}: {error}", "vocabulary", name) from error
    labels = [one.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"} for one in (ours, theirs)]
    if "Classification" in kinds[0] and labels[0] != labels[1]:
        raise GradmatchError(
            f"{name} has the labels {_listed(labels[1])}, the base {_listed(labels[0])}; whole models are mixed where they answer alike",
            "models_differ",
            name,
        )


def _listed(labels: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(labels.values())[:5])) + (", ..." if len(labels) > 5 else "")
