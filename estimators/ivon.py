"""Curvature from IVON, whose posterior N(m, 1 / (ess (hess + weight_decay))) is the product of its training.

H = ess * hess is the curvature of the summed loss, delta = ess * weight_decay the precision of the prior (Shen et al.
2024, Variational learning is effective for large deep networks).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.blocks import units
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint, model_sampler
from gradmatch.estimators.wrapped import unwrap

log = logging.getLogger(__name__)


def curvature_of_posterior(hess: Tensor, ess: float) -> Tensor:
    """H = ess * hess, of the summed loss; any shape."""
    return ess * hess


def initial_share(optimizer: Any) -> float:
    """beta2^steps, the weight of hess_init in the running mean of the Hessian; the largest of the groups, 0 where unknown."""
    steps = getattr(optimizer, "current_step", None)
    if steps is None:
        return 0.0
    return max(float(group.get("beta2", 0.0)) ** int(steps) for group in optimizer.param_groups)


def from_ivon(optimizer: Any, model: nn.Module) -> Curvature:
    """Curvature of the summed loss from a live IVON optimizer.

    IVON keeps one flat Hessian per group, over its parameters in order; parameters are matched to the model by identity.
    N is the effective sample size `ess`; `info["delta"]` is the prior's precision ess * weight_decay, `info["initial_share"]`
    how much the Hessian's initial value still weighs, beta2^steps, above a tenth of which a warning says so.

    Raises:
        TypeError: no IVON optimizer.
        ValueError: a Hessian still at its initial value, groups of different ess, or parameters that only one of
            optimizer and model has.

    Example:
        >>> optimizer = ivon.IVON(model.parameters(), lr=0.1, ess=60_000)  # doctest: +SKIP
        >>> curvature = from_ivon(optimizer, model)  # after training with it  # doctest: +SKIP
    """
    groups = getattr(optimizer, "param_groups", None)
    if not groups or not all({"hess", "ess", "weight_decay"} <= set(group) for group in groups):
        raise TypeError(
            f"{type(optimizer).__name__} is no IVON optimizer: its groups hold no hess, ess and weight_decay"
        )
    sizes = sorted({float(group["ess"]) for group in groups})
    if len(sizes) > 1:
        raise GradmatchError(
            f"the groups have different effective sample sizes {sizes}; a summed loss has one",
            "optimizer_state",
        )
    model = unwrap(model)
    names = {id(value): name for name, value in model.named_parameters()}
    num_examples = max(1, round(sizes[0]))
    mean: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        hess = group["hess"].detach()
        initial = float(group.get("hess_init", float("nan")))
        if bool((hess == torch.full_like(hess, initial)).all()):
            raise GradmatchError(
                f"the Hessian of group {number} is still at its initial value {initial}: the optimizer has taken no step, or "
                "beta2 is 1",
                "optimizer_state",
            )
        start = 0
        for value in group["params"]:
            if id(value) not in names:
                raise GradmatchError(
                    f"group {number} holds a parameter of shape {list(value.shape)} that the model does not have",
                    "optimizer_state",
                )
            flat = hess[start : start + value.numel()]
            start += value.numel()
            if value.requires_grad:
                total = curvature_of_posterior(flat, sizes[0]).view(value.shape)
                mean[names[id(value)]] = total / num_examples
    missing = [name for name, value in model.named_parameters() if value.requires_grad and name not in mean]
    if missing:
        raise GradmatchError(
            f"the optimizer does not hold {missing[0]!r} ({len(missing)} in all), so its curvature is not known; set "
            "requires_grad to False on it to leave it out",
            "optimizer_state",
            missing[0],
        )
    delta = sorted({sizes[0] * float(group["weight_decay"]) for group in groups})
    share = initial_share(optimizer)
    if share > 0.1:
        log.warning(
            "IVON's Hessian is to %.0f %% still its initial value %g (beta2 and the number of steps say so): train longer, or with a "
            "smaller beta2", 100 * share, float(groups[0].get("hess_init", float("nan"))),
        )  # fmt: skip
    info = {
        "estimator": "ivon",
        "reduction": "batch",
        "units": units(num_examples),
        "initial_share": f"{share:.4g}",
        "labels": "true labels",
        "delta": ", ".join(f"{value:.6g}" for value in delta),
        "fingerprint": fingerprint(mean, model_sampler(model)),
        "torch": torch.__version__,
    }
    return Curvature.from_dict(mean, num_examples, info)
