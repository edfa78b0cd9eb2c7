"""Curvature from a diagonal Laplace approximation fitted by laplace-torch: its posterior precision minus its prior's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.blocks import units
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint, model_sampler


def from_laplace(laplace: Any, model: nn.Module | None = None) -> Curvature:
    """Curvature of the summed loss: H = posterior_precision - prior_precision, in the order of the model's parameters.

    Args:
        laplace: a fitted DiagLaplace (all weights) or DiagLLLaplace (last layer).
        model: whose parameter names to use; the fitted model's own by default.

    Raises:
        ValueError: not fitted, not diagonal, of another size than the model's trainable parameters, or zero everywhere.

    Example:
        >>> laplace = Laplace(model, "classification", hessian_structure="diag")  # doctest: +SKIP
        >>> laplace.fit(loader)  # doctest: +SKIP
        >>> curvature = from_laplace(laplace)  # doctest: +SKIP
    """
    count = int(getattr(laplace, "n_data", 0))
    if count < 1:
        raise GradmatchError(
            "the Laplace approximation is not fitted: it has seen no data; call .fit(loader) first",
            "optimizer_state",
        )
    precision = laplace.posterior_precision
    if not isinstance(precision, Tensor) or precision.dim() != 1:
        raise GradmatchError(
            f"{type(laplace).__name__} is not diagonal; fit Laplace(..., hessian_structure='diag'), or estimate KFAC here",
            "optimizer_state",
        )
    whole = model if model is not None else laplace.model
    parameters = _fitted_parameters(laplace, whole)
    flat = (precision - laplace.prior_precision_diag).detach()
    expected = sum(value.numel() for value in parameters.values())
    if flat.numel() != expected:
        raise GradmatchError(
            f"the Laplace approximation has {flat.numel()} numbers, the model {expected} trainable weights",
            "optimizer_state",
        )
    if not bool(flat.any()):
        raise GradmatchError(
            "the Laplace approximation has a curvature of exactly zero everywhere. laplace-torch 0.3 fits that for the last layer with "
            "CurvlinopsEF, whose gradients do not reach it: fit with CurvlinopsGGN, or estimate the empirical Fisher here",
            "optimizer_state",
        )
    pieces = flat.split([value.numel() for value in parameters.values()])
    mean = {
        name: piece.view(value.shape) / count
        for (name, value), piece in zip(parameters.items(), pieces, strict=True)
    }
    info = {
        "estimator": "laplace",
        "reduction": "example",
        "units": units(count),
        "examples_seen": str(count),
        "fingerprint": fingerprint(parameters, model_sampler(parameters)),
        "torch": torch.__version__,
    }
    return Curvature.from_dict(mean, count, info)


def _fitted_parameters(laplace: Any, model: nn.Module) -> dict[str, nn.Parameter]:
    """All trainable parameters, or those of the last layer where only it was fitted, by the model's names."""
    last: Any = getattr(laplace.model, "last_layer", None)
    if isinstance(last, nn.Module):  # laplace-torch wraps the model: its own names lie one level down
        own = {id(value) for value in last.parameters()}
        source: Any = model if model is not laplace.model else laplace.model.model
        return {name: value for name, value in source.named_parameters() if id(value) in own}
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
