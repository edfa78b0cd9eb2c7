"""The Hessian of a loss in its outputs, as far as it is known: what lies between derivatives of the outputs and the GGN."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradmatch.estimators.categorical import Categorical
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.values import Bernoulli, Gaussian

if TYPE_CHECKING:
    from torch import Tensor

    from gradmatch.estimators.likelihood import Likelihood, Reading

CHUNK = 2**18  # values of float64 at a time: 2 MB


def check_hessian(likelihood: Likelihood | None) -> None:
    """Refuse a likelihood whose Hessian in the outputs is not known.

    Raises:
        ValueError: such a likelihood, by name.
    """
    if not isinstance(likelihood, Categorical | Bernoulli | Gaussian):
        raise GradmatchError(
            f"the likelihood {getattr(likelihood, 'name', None)!r} has no known Hessian in its outputs; forecasts need classification, "
            "language modelling, bernoulli or regression",
            "bad_data",
        )


def output_hessian(likelihood: Likelihood | None, reading: Reading, products: Tensor) -> Tensor:
    """sum over examples of (J u_i)' Lambda (J u_j): Lambda = diag(p) - p p' (softmax), s (1 - s), 1 / variance (Gaussian).

    products: (K, B, T, C), derivatives of the outputs along K directions. Returns (K, K) float64.

    Raises:
        ValueError: a likelihood whose output Hessian is not known.
    """
    check_hessian(likelihood)
    k, classes = len(products), reading.view.shape[2]
    outputs, products = reading.view.reshape(-1, classes), products.reshape(k, -1, classes)
    counted = (
        torch.arange(len(outputs)) if reading.valid is None else reading.valid.flatten().nonzero()[:, 0].cpu()
    )
    total = torch.zeros(k, k, dtype=torch.float64)
    # A few predictions at a time: with a vocabulary of 50,000 whole batches in float64 do not fit any cache.
    for rows in torch.split(counted, max(1, CHUNK // (k * classes))):
        v, output = products[:, rows].double(), outputs[rows].double()  # (K, R, C), (R, C)
        if isinstance(likelihood, Categorical):
            p = output.softmax(-1)
            v = (v - (p * v).sum(-1, keepdim=True)) * p.sqrt()
        elif isinstance(likelihood, Bernoulli):
            s = output.sigmoid()
            v = v * (s * (1 - s)).sqrt()
        elif isinstance(likelihood, Gaussian):
            v = v / math.sqrt(likelihood.variance)
        flat = v.flatten(1)
        total += (flat @ flat.T).cpu()
    return total
