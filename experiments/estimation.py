"""Stage: the curvature of a model on its own training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from experiments.models import batches, load_classifier, load_split, subset
from gradmatch.estimators import estimate


def curvature(
    out: Path,
    *,
    data: Path,
    model: Path,
    domain: str,
    examples: int,
    samples: int,
    batch_size: int,
    seed: int,
) -> None:
    """Monte-Carlo Fisher with the measured gradient, from `examples` of the training set, of the loss summed over it.

    Writes `out/curvature.safetensors`. N is the size of the training set, also where the Fisher is taken from a part.
    """
    classifier = load_classifier(model / "model")
    rows = load_split(data, domain, "train")
    seen = subset(rows, examples, seed)
    device = next(classifier.parameters()).device
    given = [batch for _, batch in batches(seen, batch_size, device)]
    write_fisher(out, classifier, given, num_examples=len(rows), samples=samples, seed=seed)


def write_fisher(out: Path, model: nn.Module, given: Sequence[Any], **options: Any) -> None:
    """`out/curvature.safetensors` from batches: the Monte-Carlo Fisher and the measured gradient."""
    found = estimate(model, given, method="fisher", gradient=True, **options)
    found.save(out / "curvature.safetensors")
