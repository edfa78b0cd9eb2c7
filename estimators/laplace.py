"""Curvature from a Laplace approximation fitted by laplace-torch, its posterior precision less its prior's, and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.blocks import units
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint, model_sampler
from gradmatch.estimators.names import choose


def from_laplace(laplace: Any, model: nn.Module | None = None) -> Curvature:
    """Curvature of the summed loss: H = posterior_precision - prior_precision, in the order of the model's parameters.

    Args:
        laplace: a fitted DiagLaplace or KronLaplace (all weights), or DiagLLLaplace or KronLLLaplace (last layer). Of the Kronecker
            ones the factors of matrices are kept, and of biases the diagonal of their block.
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
    factors = getattr(laplace, "H_facs", None)
    if factors is not None and hasattr(factors, "kfacs"):
        return _from_factors(laplace, factors.kfacs, model if model is not None else laplace.model, count)
    precision = laplace.posterior_precision
    if not isinstance(precision, Tensor) or precision.dim() != 1:
        raise GradmatchError(
            f"{type(laplace).__name__} is neither diagonal nor in Kronecker factors; fit Laplace(..., hessian_structure='diag' or 'kron')",
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
    return Curvature.from_dict(mean, count, _info(parameters, count))


def _info(parameters: dict[str, nn.Parameter], count: int) -> dict[str, str]:
    """What the header says."""
    return {
        "estimator": "laplace",
        "reduction": "example",
        "units": units(count),
        "examples_seen": str(count),
        "fingerprint": fingerprint(parameters, model_sampler(parameters)),
        "torch": torch.__version__,
    }


def _from_factors(laplace: Any, held: list[Any], whole: nn.Module, count: int) -> Curvature:
    """From Kronecker factors, a list a parameter: [B, A] of a matrix, [block] of anything else, of the summed loss together."""
    parameters = _fitted_parameters(laplace, whole)
    if len(held) != len(parameters):
        raise GradmatchError(
            f"the Laplace approximation has factors of {len(held)} parameters, the model has {len(parameters)}",
            "optimizer_state",
        )
    scale = float(getattr(laplace, "_H_factor", 1.0)) / count
    mean, a, b = {}, {}, {}
    for (name, value), blocks in zip(parameters.items(), held, strict=True):
        first = blocks[0].detach() * scale
        if len(blocks) == 2:
            a[name], b[name] = blocks[1].detach(), first
            found = torch.outer(first.diagonal(), a[name].diagonal())
        else:
            found = first.diagonal() if first.dim() == 2 else first
        if found.numel() != value.numel():
            raise GradmatchError(
                f"the factors of {name!r} are of {found.numel()} weights, the model has {list(value.shape)}",
                "optimizer_state",
                name,
            )
        mean[name] = found.reshape(value.shape)
    return Curvature.from_dict(mean, count, _info(parameters, count), factor_a=a, factor_b=b)


def to_laplace(
    curvature: Curvature,
    model: nn.Module,
    likelihood: str,
    *,
    outputs: int,
    structure: str = "auto",
    **options: Any,
) -> Any:
    """A curvature as a fitted approximation of laplace-torch, which then predicts with its uncertainty.

    Args:
        curvature: of all trainable parameters of the model.
        model: at the weights that it was taken at.
        likelihood: "classification" or "regression", as laplace-torch takes it.
        outputs: numbers that the model puts out for an example.
        structure: "kronecker", "diagonal", or "auto": Kronecker where every matrix has both factors.
        **options: of laplace-torch: prior_precision, sigma_noise, temperature, ...

    Returns:
        A KronLaplace or DiagLaplace. Its training loss is not known, so that its marginal likelihood is nan.

    Raises:
        ValueError: laplace-torch is not installed, a curvature of other weights, parameters without curvature, or, with
            structure="kronecker", matrices without factors.

    Example:
        >>> to_laplace(curvature, model, "classification", outputs=3)(x)                 # doctest: +SKIP
    """
    choose("structure", structure, ("auto", "kronecker", "diagonal"))
    try:
        from laplace import DiagLaplace, KronLaplace
        from laplace.utils.matrix import Kron
    except ModuleNotFoundError as error:
        raise GradmatchError(
            f"{error.name} is not installed, which this needs: pip install laplace-torch", "bad_arguments"
        ) from error
    curvature.check_model(model_sampler(model), "the given model")
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    missing = [name for name in parameters if name not in curvature]
    if missing:
        raise GradmatchError(
            f"the curvature lacks {missing[0]!r} ({len(missing)} parameters in all)",
            "missing_curvature",
            missing[0],
        )
    bare = [
        n
        for n, v in parameters.items()
        if v.dim() > 1 and (curvature.factor_a(n) is None or curvature.factor_b(n) is None)
    ]
    if structure == "kronecker" and bare:
        raise GradmatchError(
            f"{bare[0]!r} has no two factors; estimate with method='kfac', or pass structure='diagonal'", "missing_curvature", bare[0]
        )  # fmt: skip
    count = curvature.num_examples
    if structure == "diagonal" or bare:
        made = DiagLaplace(model, likelihood, **options)
        made.H = torch.cat([curvature.total(name).flatten() for name in parameters])
    else:
        made = KronLaplace(model, likelihood, **options)
        made.H_facs = Kron([_factors(curvature, name, count) for name in parameters])
        made.H = made.H_facs.decompose(damping=made.damping)
    made.mean = nn.utils.parameters_to_vector(parameters.values()).detach()
    made.n_data, made.n_outputs, made.loss = count, outputs, math.nan
    model.output_size = outputs  # type: ignore[assignment]
    return made


def _factors(curvature: Curvature, name: str, count: int) -> list[Tensor]:
    """[N B, A] of a matrix, [N times the diagonal] of anything else."""
    a, b = curvature.factor_a(name), curvature.factor_b(name)
    return [torch.diag(curvature.total(name).flatten())] if a is None or b is None else [b * count, a]


def _fitted_parameters(laplace: Any, model: nn.Module) -> dict[str, nn.Parameter]:
    """All trainable parameters, or those of the last layer where only it was fitted, by the model's names."""
    last: Any = getattr(laplace.model, "last_layer", None)
    if isinstance(last, nn.Module):  # laplace-torch wraps the model: its own names lie one level down
        own = {id(value) for value in last.parameters()}
        source: Any = model if model is not laplace.model else laplace.model.model
        return {name: value for name, value in source.named_parameters() if id(value) in own}
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
