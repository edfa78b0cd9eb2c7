"""The models and data of a sentiment run, as the stages of this package take them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.finetune import uses_bfloat16
from experiments.models import batches, load_classifier, load_split, subset
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


def examples(data: Path, domain: str, split: str, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """`count` examples drawn by the seed, in batches of like length."""
    rows = load_split(data, domain, split)
    return [batch for _, batch in batches(subset(rows, count, seed), 32)]


def fast() -> AbstractContextManager[Any]:
    """Forward passes in bfloat16 where the machine has its arithmetic: three times as many examples a second.

    Only for losses and accuracies of finished models; gradients and Jacobian-vector products stay in float32.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, dtype=torch.bfloat16) if uses_bfloat16("auto") else nullcontext()
