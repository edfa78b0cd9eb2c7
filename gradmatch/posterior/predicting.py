"""Predictions that know how sure the weights are: draws from the posterior of a merge, pushed through the linearised network.

The posterior is N(theta, P^-1) with the precision P of the merge. With the Jacobian J of the logits at theta, the linearised
network f(x) + J (theta' - theta) has Gaussian logits, N(f(x), J P^-1 J') (Immer et al. 2021); draws of J (theta' - theta) cost one
Jacobian-vector product each, whatever the structure of P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmatch.estimators.batches import BatchReader
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.likelihood import find_logits
from gradmatch.models.curvatures import open_curvature
from gradmatch.rules.structures import Basis, Product, Sum, common_basis

if TYPE_CHECKING:
    from torch import nn

    from gradmatch.estimators.curvature import Curvature
    from gradmatch.merging import CurvatureLike


@dataclass(frozen=True)
class Prediction:
    """What a network and the posterior of its weights say of some examples.

    Attributes:
        plain: (n, C), the network's own probabilities.
        probabilities: (n, C), their mean over the draws of the linearised network.
        variance: (n, C), of the logits over the draws, the linearised predictive variance.
        labels: (n,), the true labels where the batches hold them, or None.
    """

    plain: Tensor
    probabilities: Tensor
    variance: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Calibration:
    """How good probabilities are.

    Attributes:
        nll: mean negative log-probability of the true labels, nats per example.
        ece: expected calibration error, |accuracy - confidence| over equally wide bins of confidence, weighted by their examples.
        accuracy: share of examples whose most probable class is the label.
    """

    nll: float
    ece: float
    accuracy: float


def draws(
    posterior: CurvatureLike, count: int = 16, *, seed: int = 0, scale: float = 1.0
) -> Iterator[dict[str, Tensor]]:
    """Random differences theta' - theta from N(0, scale P^-1), by name; the weights of a draw are the merge's plus these.

    Of a matrix with one Kronecker product they are exact; of several, P is taken by its diagonal in their common eigenbasis.

    Args:
        posterior: of a merge, or any positive curvature of a summed loss.
        count: how many.
        seed: of the draws.
        scale: factor on the covariance: 1 is the posterior itself.

    Raises:
        ValueError: a precision that is not positive, or a number out of range.

    Example:
        >>> from gradmatch.estimators import Curvature
        >>> known = Curvature.from_dict({"w": torch.tensor([1e-4, 1e4])}, 1)
        >>> [one["w"].abs().max().item() > 1 for one in draws(known, 2)]
        [True, True]
    """
    known = open_curvature(posterior)
    if count < 1 or not scale >= 0:
        raise GradmatchError(
            f"count is {count} and scale {scale}; at least one draw, and a scale of at least 0",
            "out_of_range",
        )
    generator = torch.Generator().manual_seed(seed)
    spreads = {name: _spread(known, name) for name in known}
    for _ in range(count):
        noise = {name: torch.randn(known.mean(name).shape, generator=generator) for name in known}
        yield {name: scale**0.5 * spreads[name](one) for name, one in noise.items()}


def predict(
    model: nn.Module,
    batches: Iterable[Any],
    posterior: CurvatureLike,
    *,
    samples: int = 16,
    seed: int = 0,
    scale: float = 1.0,
) -> Prediction:
    """Class probabilities of a merged classifier, averaged over the posterior of its weights.

    Args:
        model: with the merged weights; its parameters go by the names of the posterior.
        batches: as `estimate` takes them.
        posterior: of the merge, `merge(...).posterior` or its file.
        samples: draws of the weights; each costs a forward pass with its Jacobian-vector product.
        seed: of the draws.
        scale: factor on the covariance. A diagonal posterior, which leaves out how weights vary together, is often too wide or
            too narrow: choose it on held-out data by `calibration`.

    Returns:
        A Prediction.

    Raises:
        ValueError: no parameter of the model in the posterior, logits that are not (examples, classes), or no batches.

    Example:
        >>> from gradmatch.estimators import Curvature
        >>> model = torch.nn.Linear(2, 2)
        >>> sure = Curvature.from_dict({name: torch.ones_like(p) for name, p in model.named_parameters()}, 10**9)
        >>> found = predict(model, [(torch.ones(3, 2), torch.zeros(3).long())], sure)
        >>> torch.allclose(found.probabilities, found.plain, atol=1e-3)
        True
    """
    known = open_curvature(posterior)
    parameters = dict(model.named_parameters())
    chosen = [name for name in parameters if name in known]
    unknown = sorted(set(known) - set(parameters))
    if not chosen or unknown:
        raise GradmatchError(
            f"the posterior holds {unknown[0] if unknown else 'nothing'!r}, which is no parameter of the model ({len(chosen)} are); give the "
            "module that the merged weights were loaded into",
            "other_weights",
            "posterior",
        )
    values = {name: parameters[name].detach() for name in chosen}
    read = BatchReader(model, next(iter(values.values())).device)
    held = [read(raw, index) for index, raw in enumerate(batches)]
    if not held:
        raise GradmatchError("no batches to predict", "bad_batch")
    moved: list[list[Tensor]] = [[] for _ in held]
    logits: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        with torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH
        ):  # others have no forward derivative
            for move in draws(known, samples, seed=seed, scale=scale):
                tangents = {name: move[name].to(values[name]) for name in chosen}
                for place, batch in enumerate(held):

                    def output(weights: dict[str, Tensor], batch: Any = batch) -> Tensor:
                        return find_logits(
                            torch.func.functional_call(model, weights, batch.args, batch.kwargs)
                        )

                    found, change = torch.func.jvp(output, (values,), (tangents,))[:2]
                    if found.dim() != 2:
                        raise GradmatchError(
                            f"the model's logits have shape {list(found.shape)}; predictions are of classifiers, (examples, classes)",
                            "bad_batch",
                        )
                    moved[place].append(change.detach())
                    if len(logits) < len(held):
                        logits.append(found.detach())
    finally:
        model.train(training)
    drawn = torch.cat([torch.stack(one) for one in moved], 1)  # (S, n, C)
    centre = torch.cat(logits)
    labels = [batch.labels for batch in held]
    return Prediction(
        centre.softmax(-1),
        (centre + drawn).softmax(-1).mean(0),
        drawn.square().mean(0),
        torch.cat(labels).flatten() if all(isinstance(one, Tensor) for one in labels) else None,
    )


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """NLL, expected calibration error and accuracy of class probabilities (n, C) at the true labels (n,).

    Raises:
        ValueError: shapes that do not fit, or labels outside the classes.

    Example:
        >>> calibration(torch.tensor([[0.8, 0.2], [0.2, 0.8]]), torch.tensor([0, 0]))
        Calibration(nll=0.916..., ece=0.30..., accuracy=0.5)
    """
    fits = probabilities.dim() == 2 and labels.shape == probabilities.shape[:1] and len(labels)
    if not fits or int(labels.min()) < 0 or int(labels.max()) >= probabilities.shape[1]:
        raise GradmatchError(
            f"probabilities of shape {list(probabilities.shape)} and labels of shape {list(labels.shape)}: there must be one label an "
            "example, of the classes 0 to C - 1",
            "bad_batch",
        )
    p = probabilities.double()
    sure, choice = p.max(-1)
    right = (choice == labels).double()
    place = (sure * bins).ceil().long().clamp(1, bins) - 1  # (low, high]
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - sure)
    nll = -p.gather(1, labels.long()[:, None]).clamp(min=torch.finfo(p.dtype).tiny).log().mean()
    return Calibration(float(nll), float(gap.abs().sum() / len(labels)), float(right.mean()))


def _spread(posterior: Curvature, name: str) -> Callable[[Tensor], Tensor]:
    """P^(-1/2) of one tensor, as a map of its noise.

    Raises:
        ValueError: its precision is not positive.
    """
    mean, a, b = posterior.mean(name), posterior.factor_a(name), posterior.factor_b(name)
    if a is None:
        spread = _inverse_root(posterior.num_examples * mean, name)
        return lambda noise: noise * spread
    a, b = a.reshape(-1, *a.shape[-2:]), None if b is None else b.reshape(-1, *b.shape[-2:])
    like = mean.reshape(len(mean), -1)
    parts = [Product(posterior.num_examples, one, None if b is None else b[k]) for k, one in enumerate(a)]
    whole = Sum(tuple(parts))
    turned = like.shape[1] != a.shape[-1]  # stored [in, out]
    if mean.dim() == 2 and like.shape[0] == like.shape[1]:  # then the diagonal tells, where the sizes cannot
        unit = Basis(None, None).diagonal((1 / posterior.num_examples) * whole, like)
        turned = bool((unit.mT - like).norm() < (unit - like).norm())
    like = like.mT if turned else like
    basis = common_basis(whole, like)
    spread = _inverse_root(basis.diagonal(whole, like), name)

    def drawn(noise: Tensor) -> Tensor:
        found = basis.back(noise.to(spread.dtype).reshape(spread.shape) * spread)
        return (found.mT if turned else found).reshape(mean.shape)

    return drawn


def _inverse_root(precision: Tensor, name: str) -> Tensor:
    if not bool((precision > 0).all()):
        raise GradmatchError(
            f"{name!r}: {int((precision <= 0).sum())} precisions are not positive, so there is no posterior to draw from; merge with a delta0 "
            "above 0",
            "not_positive",
            name,
        )
    return precision.rsqrt()
