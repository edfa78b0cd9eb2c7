"""Curvature from linear operators, such as those of curvlinops: their diagonal, or the Kronecker factors that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.blocks import units
from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.fingerprint import fingerprint, model_sampler
from gradmatch.estimators.problem import trainable_parameters

COLUMNS = 64  # vectors that are multiplied at once
MOST = 100_000  # weights whose diagonal is read column by column


def from_operator(
    operator: Any,
    model: nn.Module,
    *,
    num_examples: int | None = None,
    scale: float | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Curvature:
    """Curvature of the summed loss from a linear operator over a model's trainable weights.

    Of curvlinops' KFACLinearOperator the factors are kept; of every other operator (GGN, Hessian, empirical Fisher, a dense
    matrix) its diagonal.

    Args:
        operator: square, with `shape` and `@` on (P, K) tensors, in the order of the parameters.
        model: whose weights it is over; the parameters are named by identity where the operator holds them, else by order.
        num_examples: N, the size of the training set; None: the examples that the operator has seen.
        scale: the factor that makes it the curvature of the loss *summed* over the examples that it has seen, in nats. None: known
            for a CrossEntropyLoss over one label an example ("sum": 1, "mean": their number); refused otherwise.
        samples: estimate the diagonal with so many random signs (Hutchinson) in place of one product a weight.
        seed: of these.

    Raises:
        ValueError: another size than the model's, a scale or number of examples that is not known, or too many weights for
            an exact diagonal.

    Example:
        >>> ggn = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), params, batches)      # doctest: +SKIP
        >>> curvature = from_operator(ggn, model)                                                # doctest: +SKIP
    """
    parameters = _named(operator, model)
    total = sum(value.numel() for value in parameters.values())
    shape = tuple(getattr(operator, "shape", ()))
    if shape != (total, total):
        raise GradmatchError(
            f"the operator has shape {list(shape)}, the model {total} trainable weights",
            "shape_mismatch",
            "operator",
        )
    seen = getattr(operator, "_N_data", None) or num_examples
    if not seen:
        raise GradmatchError(
            "the operator does not say how many examples it has seen; pass num_examples=",
            "bad_arguments",
            "operator",
        )
    factor = float(_scale(operator, int(seen)) if scale is None else scale) / int(seen)
    count = int(num_examples or seen)
    info = {
        "estimator": type(operator).__name__,
        "reduction": "example",
        "units": units(count),
        "examples_seen": str(int(seen)),
        "fingerprint": fingerprint(parameters, model_sampler(parameters)),
        "torch": torch.__version__,
    }
    held = _factors(operator, parameters)
    if held is not None:
        a, b = held
        b = {name: value * factor for name, value in b.items()}
        mean = {name: _diagonal(a.get(name), b[name], value) for name, value in parameters.items()}
        b = {name: value for name, value in b.items() if name in a}
        return Curvature.from_dict(mean, count, info, factor_a=a, factor_b=b)
    if samples is None and total > MOST:
        raise GradmatchError(
            f"an exact diagonal takes {total} products with the operator; pass samples=, so many random ones, or estimate it here "
            "(gradmatch.estimate)",
            "out_of_range",
            "operator",
        )
    like = next(iter(parameters.values()))
    flat = (
        _exact(operator, total, like)
        if samples is None
        else _hutchinson(operator, total, like, samples, seed)
    ) * factor
    pieces = torch.split(flat, [value.numel() for value in parameters.values()])
    mean = {
        name: piece.view(value.shape) for (name, value), piece in zip(parameters.items(), pieces, strict=True)
    }
    return Curvature.from_dict(mean, count, {**info, **({"samples": str(samples)} if samples else {})})


def _named(operator: Any, model: nn.Module) -> dict[str, nn.Parameter]:
    """The operator's parameters by the model's names, in the operator's order."""
    parameters = trainable_parameters(model)
    own = getattr(operator, "_params", None)
    if own is None:
        return parameters
    names = {id(value): name for name, value in model.named_parameters()}
    lost = [place for place, value in enumerate(own) if id(value) not in names]
    if lost:
        raise GradmatchError(
            f"parameter {lost[0]} of the operator is none of the model's: give the model that the operator was made with",
            "other_weights",
            "operator",
        )
    return {names[id(value)]: value for value in own}


def _scale(operator: Any, seen: int) -> float:
    """What makes the operator that of a summed loss in nats, where its loss tells."""
    loss = getattr(operator, "_loss_func", None)
    single = getattr(operator, "_num_per_example_loss_terms", 1) == 1
    if isinstance(loss, nn.CrossEntropyLoss) and single and loss.label_smoothing == 0 and loss.weight is None:
        return {"sum": 1.0, "mean": float(seen)}[loss.reduction]
    raise GradmatchError(
        f"the units of this operator are not known (its loss is {type(loss).__name__ if loss is not None else 'not told'}); pass scale=, "
        "the factor that makes it the curvature of the summed loss in nats: of CrossEntropyLoss(reduction='mean') over N examples N, "
        "of MSELoss(reduction='sum') 1/2",
        "units",
        "operator",
    )


def _exact(operator: Any, total: int, like: Tensor) -> Tensor:
    """The diagonal, a product a weight, `COLUMNS` at a time."""
    found = torch.empty(total, dtype=like.dtype, device=like.device)
    for first in range(0, total, COLUMNS):
        rows = torch.arange(first, min(first + COLUMNS, total), device=like.device)
        unit = torch.zeros(total, len(rows), dtype=like.dtype, device=like.device)
        unit[rows, rows - first] = 1.0
        found[rows] = (operator @ unit).detach()[rows, rows - first]
    return found


def _hutchinson(operator: Any, total: int, like: Tensor, samples: int, seed: int) -> Tensor:
    """mean of z * (A z) over random signs z (Bekas et al. 2007)."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(total, dtype=like.dtype, device=like.device)
    for _ in range(samples):
        z = (torch.randint(0, 2, (total, 1), generator=generator) * 2 - 1).to(like)
        found += (z * (operator @ z).detach())[:, 0] / samples
    return found


def _factors(
    operator: Any, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """A and B of curvlinops' KFAC by parameter (of a bias B alone); None of an operator without, or with weight and bias in one."""
    if not hasattr(operator, "_gradient_covariances") or not getattr(
        operator, "_separate_weight_and_bias", False
    ):
        return None
    if not operator._gradient_covariances:
        operator.compute_kronecker_factors()
    names = list(parameters)
    a, b = {}, {}
    for module, places in operator._mapping.items():
        for kind, place in places.items():
            name = names[place]
            b[name] = operator._gradient_covariances[module].detach()
            if kind == "weight":
                a[name] = operator._input_covariances[module].detach()
    return (a, b) if set(b) == set(names) else None


def _diagonal(a: Tensor | None, b: Tensor, value: Tensor) -> Tensor:
    """diag(B (x) A) in the parameter's shape; of a bias that of B."""
    rows = b.diagonal()
    return (rows if a is None else torch.outer(rows, a.diagonal())).reshape(value.shape)
