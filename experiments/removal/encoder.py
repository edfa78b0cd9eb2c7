"""Stages of the proof on an encoder: wrong labels, curvature over several domains, and every edit against retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.evaluate import BATCH
from experiments.files import CARD, write_json
from experiments.models import load_classifier
from experiments.removal.proof import Parts, diagonal_edits, measured
from experiments.rows import Batch, Texts, card_of, load_split
from gradmatch.estimators import Curvature, estimate

CURVATURE = "curvature.safetensors"
DELTA0 = 1e-6


def poison(out: Path, *, data: Mapping[str, Path], domain: str, count: int) -> None:
    """Copy the data with the labels of one domain turned round, in every split; `count` training texts of it remain."""
    card = card_of(data)
    for split in data:
        for name in card["domains"]:
            rows = load_split(data, name, split)
            if name == domain:
                rows = rows.subset(count, 0) if split == "train" else rows
                rows = Texts(rows.table.map(lambda row: {"labels": 1 - row["labels"]}))
            rows.table.save_to_disk(out / name / split)
    write_json(out / CARD, card)


def curvature(
    out: Path, *, data: Path, model: Path, domains: Sequence[str], seed: int, examples: int
) -> None:
    """Monte-Carlo Fisher over the training texts of several domains together: `out/curvature.safetensors`."""
    from datasets import concatenate_datasets

    classifier = load_classifier(model / "model")
    rows = Texts(concatenate_datasets([load_split(data, domain, "train").table for domain in domains]))
    seen = rows.subset(examples, seed).given(32, classifier)
    estimate(classifier, seen, num_examples=len(rows), seed=seed).save(out / CURVATURE)


def compare(
    out: Path,
    *,
    data: Path,
    base: Path,
    retrained: Path,
    task: Path,
    rest: Path,
    base_curvature: Path,
    task_curvature: Path,
    keep: Sequence[str],
    remove: str,
    alphas: Sequence[float],
) -> None:
    """Every edit against the model that never saw the wrong labels; the rows are those of `proof.measured`."""
    classifier = load_classifier(base / "model")

    def given(name: str, split: str) -> Any:
        return load_split(data, name, split).given(BATCH, classifier)

    def labelled(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Tensor]:
        return batches, torch.cat([batch.pop("labels") for batch in batches])

    @torch.inference_mode()
    def logits(theta: Mapping[str, Tensor], batches: Sequence[Batch]) -> Tensor:
        classifier.load_state_dict(theta, strict=False)
        return torch.cat([classifier(**batch).logits.double() for batch in batches])

    def weights(folder: Path) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in load_classifier(folder / "model").named_parameters()}

    theta0 = weights(base)
    curvatures = [Curvature.load(folder / CURVATURE) for folder in (base_curvature, task_curvature)]
    edits = {("base", 0.0): theta0, ("retrained", 0.0): weights(retrained)}
    edits["fine-tuned on the rest", 0.0] = weights(rest)
    edits |= diagonal_edits(theta0, weights(task), curvatures, alphas, DELTA0)
    parts = Parts(
        remove=labelled(given(remove, "train")),
        unseen=labelled([batch for name in keep for batch in given(name, "test")]),
        unseen_wrong=labelled(given(remove, "test")),
    )
    write_json(out / "rows.json", measured(logits, edits, parts))
