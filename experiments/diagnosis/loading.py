"""The models and data of a sentiment run, as the stages of this package take them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.models import load_classifier
from experiments.precision import autocast
from experiments.rows import Views, load_split
from gradmatch.estimators import Curvature

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A base, its fine-tunes, and their curvatures by task ("base": the base's); `module` lends its structure."""

    module: Any
    base: dict[str, torch.Tensor]
    tasks: dict[str, dict[str, torch.Tensor]]
    curvatures: dict[str, Curvature]


def load_run(
    base: Path, tasks: Mapping[str, Path], base_curvature: Path, curvatures: Mapping[str, Path]
) -> Run:
    """Read what the stages of a sentiment run left in their folders."""
    module = load_classifier(base / "model")
    return Run(
        module,
        {name: value.clone() for name, value in module.state_dict().items()},
        {task: dict(load_classifier(folder / "model").state_dict()) for task, folder in tasks.items()},
        {
            task: Curvature.load(folder / "curvature.safetensors")
            for task, folder in {**curvatures, "base": base_curvature}.items()
        },
    )


def examples(data: Views, domain: str, split: str, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """`count` examples drawn by the seed, in batches of like length."""
    return load_split(data, domain, split).subset(count, seed).given(32)


def fast() -> AbstractContextManager[Any]:
    """Forward passes in bfloat16 where the machine has its arithmetic: three times as many examples a second.

    Only for losses and accuracies of finished models; gradients and Jacobian-vector products stay in float32.
    """
    return autocast("auto")
