"""Stage: the curvature of a model on its own training data."""

from __future__ import annotations

from pathlib import Path

from experiments.models import load_classifier, narrowed
from experiments.rows import load_split
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
    rows = load_split(data, domain, "train")
    classifier = narrowed(load_classifier(model / "model"), rows.classes)
    given = rows.subset(examples, seed).given(batch_size, classifier)
    options = {"num_examples": len(rows), "samples": samples, "seed": seed}
    estimate(classifier, given, method="fisher", gradient=True, **options).save(out / "curvature.safetensors")
