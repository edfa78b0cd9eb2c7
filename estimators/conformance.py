"""`check_estimator`: whether an estimator of one's own keeps what `protocol.py` asks of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.estimators.curvature import Curvature
from gradmatch.estimators.estimation import ESTIMATORS, estimate
from gradmatch.estimators.protocol import Estimator, gives_of

NAME = "the estimator under test"


def check_estimator(estimator: Estimator, **options: Any) -> Curvature:
    """Run an estimator on a tiny network and check its promises; what it measured is returned.

    Its mean blocks must go by the names of the model's parameters, in their shapes, finite, per example (four times the
    same data, about the same blocks), the same again for the same seed; the model must be left as it was; each option
    in its `GIVES` must be served, and the gradient must be that of the summed loss. Call it from a test of your own.

    Args:
        estimator: a module or object with start, step and finish.
        options: passed on to `estimate` (samples, labels, ...).

    Returns:
        Its curvature of the tiny network, to compare with what you expect.

    Raises:
        AssertionError: a promise that is not kept; the message says which.

    Example:
        >>> from gradmatch.estimators import fisher
        >>> check_estimator(fisher).trace() > 0
        True
    """
    if NAME in ESTIMATORS:
        raise RuntimeError("check_estimator does not run inside itself")
    ESTIMATORS[NAME] = estimator
    try:
        return _check(estimator, {"method": NAME, "progress": False, **options})
    finally:
        del ESTIMATORS[NAME]


def _promise(kept: bool, broken: str) -> None:
    if not kept:
        raise AssertionError(broken)


def _check(estimator: Estimator, options: dict[str, Any]) -> Curvature:
    gives = gives_of(estimator)
    model, batches = _network(), _batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = estimate(model, batches, **options)
    parameters = dict(model.named_parameters())
    kept = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    _promise(kept, "the model's weights were changed")
    kept = model.training and all(value.requires_grad for value in parameters.values())
    _promise(kept, "the model was not left as it was (training mode, requires_grad)")
    for name in found:
        has, wants = list(found[name].shape), list(parameters[name].shape)
        _promise(has == wants, f"the mean block of {name!r} has shape {has}, the parameter {wants}")
    again = estimate(_network(), batches, **options)
    _promise(
        all(torch.equal(found[name], again[name]) for name in found),
        "the same seed gave other numbers: draw from problem.seed and the batch's place alone",
    )
    ratio = estimate(_network(), batches * 4, **options).trace() / found.trace()
    _promise(
        0.5 < ratio < 2,
        f"four times the same data gave {ratio:.3g} times the trace: blocks are means over examples; divide the sums by `seen`",
    )
    if "standard_error" in gives:
        errors = estimate(_network(), batches, standard_error=True, **options)
        parts = [errors.standard_error(name) for name in errors]
        kept = all(part is not None and bool((part >= 0).all()) for part in parts)
        _promise(kept, "standard errors are missing or negative")
    if "gradient" in gives:
        measured = estimate(_network(), batches, gradient=True, **options)
        for name, wanted in _gradient(batches).items():
            value = measured.gradient(name)
            kept = value is not None and torch.allclose(value, wanted, rtol=1e-4, atol=1e-6)
            _promise(kept, f"the gradient of {name!r} is not that of the summed loss at the true labels")
    if "tolerance" in gives:
        stopped = estimate(_network(), batches * 16, tolerance=0.9, **options)
        _promise("stopped" in stopped.info, "tolerance=0.9 was not reached on sixteen times the same data")
    return found


def _network() -> nn.Module:
    """Four features, three classes; dropout tells whether it runs in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def _batches() -> list[tuple[Tensor, Tensor]]:
    """32 examples in batches of 8."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (32,), generator=generator)
    return list(zip(x.view(4, 8, 4), y.view(4, 8), strict=True))


def _gradient(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of the summed loss, by autograd."""
    model = _network().eval()
    loss = sum(nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in batches)
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))  # type: ignore[arg-type]
