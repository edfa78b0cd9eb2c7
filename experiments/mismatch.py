"""Stages: the gradient mismatch of a merged model (Eq. 6), against the joint objective sum_t l_t."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.files import write_json
from experiments.models import load_classifier, narrowed
from experiments.preconditioned import save
from experiments.rows import Views, load_split
from gradmatch.estimators import Curvature
from gradmatch.measure.mismatch import gradient_mismatch
from gradmatch.measure.objective import Objective

BATCH = 32


def objective(data: Views, model: Path, domain: str, examples: int, seed: int) -> Objective:
    """l_t: the loss of a domain's training set, from `examples` of it, scaled up to all."""
    rows = load_split(data, domain, "train")
    module = narrowed(load_classifier(model / "model"), rows.classes)
    return Objective(module, rows.subset(examples, seed).given(BATCH, module), num_examples=len(rows))


def task_gradient(out: Path, *, data: Views, model: Path, domain: str, examples: int, seed: int) -> None:
    """grad l_t(theta_t) of a fine-tuned model, which the mismatch of every merge is compared with."""
    loss = objective(data, model, domain, examples, seed)
    save_file(loss.gradient(dict(loss.module.state_dict())), out / "gradient.safetensors")


def mismatch(
    out: Path,
    *,
    data: Views,
    model: Path,
    gradients: Mapping[str, Path],
    base_curvature: Path,
    examples: int,
    seed: int,
) -> None:
    """Norms of m_t and of sum_t m_t for one merged model in `out/mismatch.json`; see `write_mismatch`.

    All weights are 1 whatever the merge's own: every merge is an estimate of the same joint model, which minimises
    sum_t l_t + 1/2 ||theta - theta0||^2_{H0}, and is measured against it.
    """
    losses = {domain: objective(data, model, domain, examples, seed) for domain in gradients}
    theta = dict(next(iter(losses.values())).module.state_dict())
    write_mismatch(out, theta, losses, gradients, base_curvature)


def write_mismatch(
    out: Path,
    theta: Mapping[str, Tensor],
    losses: Mapping[str, Objective],
    gradients: Mapping[str, Path],
    base_curvature: Path,
) -> None:
    """The norms of `mismatch` for weights theta by name, in `out/mismatch.json`; losses and gradients by task.

    `out/preconditioned.npz` holds what ||H0^-1 sum_t m_t|| is read off at any floor of H0, see `experiments.preconditioned`.
    """
    found = gradient_mismatch(
        theta,
        dict.fromkeys(losses, theta),  # the fine-tunes' own gradients are stored
        lambda domain, weights: losses[domain].gradient(weights),
        dict.fromkeys(losses, 1.0),
        {domain: loss.num_examples for domain, loss in losses.items()},
        stored={domain: load_file(folder / "gradient.safetensors") for domain, folder in gradients.items()},
        keep_vectors=True,
    )
    card = {
        "total": found.total_norm(),
        "per_example": found.per_example(),
        "tasks": found.task_norms(),
        "layers": found.layers()["total"],
    }
    write_json(out / "mismatch.json", card)
    h0 = Curvature.load(base_curvature / "curvature.safetensors")
    save(out, found.vectors, {name: h0.total(name) for name in h0})
