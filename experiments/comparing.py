"""Stages: two models over the same test examples, and the distance of a merge from the joint model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from experiments.files import write_json
from experiments.rows import Views, card_of, load_split
from experiments.statistics import DRAWS, Array, Documents, paired_bootstrap, paired_p


def compare(
    out: Path, *, ours: Mapping[str, Path], theirs: Mapping[str, Path], data: Views, domains: Sequence[str]
) -> None:
    """Macro accuracy of one model minus another's, over the same test examples, with its bootstrap interval.

    Of language models the macro loss a token is compared.
    ours, theirs: seed -> folder of an evaluation; data: whose test examples they are. Writes `out/comparison.json`.
    """
    quantity = "nll" if card_of(data).get("language") else "correct"
    differences = correct_less(ours, theirs, domains, quantity)
    documents = documents_of(data, domains)
    low, high = paired_bootstrap(differences, documents)
    by_seed = np.mean([part.mean(1) for part in differences], axis=0)
    card: dict[str, Any] = {
        "quantity": quantity,
        "difference": float(by_seed.mean()),
        "low": low,
        "high": high,
        "p": paired_p(differences, documents),
        "seeds": len(ours),
        "by_seed": dict(zip(ours, by_seed.tolist(), strict=True)),
        "draws": DRAWS,
    }
    write_json(out / "comparison.json", card)


def distance(out: Path, *, model: Path, base: Path, joint: Path) -> None:
    """||theta - theta_joint||, and as a share of ||theta_0 - theta_joint||: `out/distance.json`."""
    theta, start, target = (
        load_file(folder / "model" / "model.safetensors") for folder in (model, base, joint)
    )
    left, whole = (
        sum(float(np.square(weights[name].astype(float) - target[name]).sum()) for name in target) ** 0.5
        for weights in (theta, start)
    )
    write_json(out / "distance.json", {"distance": left, "relative": left / whole})


def correct_less(
    ours: Mapping[Any, Path], theirs: Mapping[Any, Path], domains: Sequence[str], quantity: str = "correct"
) -> list[Array]:
    """Per domain (seeds, n_d): 1 where only ours is right, -1 where only theirs is (or by how much `quantity` differs); by seed."""

    def of(folder: Path, domain: str) -> Array:
        found: Array = np.load(folder / f"{domain}.npz")[quantity]
        return found

    return [np.stack([of(ours[s], name) - of(theirs[s], name) for s in ours]) for name in domains]


def documents_of(data: Views, domains: Sequence[str]) -> Documents:
    """Which document each test example of a domain belongs to, where the data say so (texts)."""
    return [load_split(data, domain, "test").documents() for domain in domains]
