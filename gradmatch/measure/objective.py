"""One task's loss as a function of the weights: value, gradient, and exact GGN products of a module on data.

The module lends its structure; the weights come from mappings, so that one module serves the base, every fine-tune and
every merge. Losses are negative log-likelihoods in nats, summed over the task's N examples (scaled up from those seen).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from gradmatch.estimators.batches import BatchReader
from gradmatch.estimators.categorical import Categorical
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.inference import infer_likelihood, make_likelihood
from gradmatch.estimators.likelihood import Reading, find_logits
from gradmatch.estimators.values import Bernoulli
from gradmatch.estimators.wrapped import unwrap
from gradmatch.measure.curving import check_hessian, output_hessian
from gradmatch.measure.seats import Seats, Tensors, Weights

if TYPE_CHECKING:
    from torch import Tensor, nn


class OutputNotFiniteError(ValueError):
    """A model whose outputs are NaN or infinite: weights that are, or that overflow."""


class Objective:
    """The summed loss of one task.

    Args:
        module: any nn.Module; its own weights are never changed, its mode is restored after each use.
        batches: dicts of tensors (HF style) or (inputs, targets) tuples; kept as a list and gone through many times.
        num_examples: N of the summed loss; None: the number of examples in the batches.
        likelihood: as `gradmatch.estimators.estimate` takes it.

    Attributes:
        seen: number of examples in the batches.
        num_examples: N.
        scale: N / seen.

    Raises:
        ValueError: no batches.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        num_examples: int | None = None,
        likelihood: str | Any = "auto",
    ) -> None:
        self.module = module = unwrap(module)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        reader = BatchReader(module, device)
        self.batches = [reader(raw, index) for index, raw in enumerate(batches)]
        if not self.batches:
            raise GradmatchError(
                "no batches: the loss needs at least one (an iterator that was used up before?)", "bad_data"
            )
        self.seen = sum(batch.size for batch in self.batches)
        self.num_examples = num_examples or self.seen
        self.scale = self.num_examples / self.seen
        self._likelihood = make_likelihood(likelihood)
        self._seats = Seats(module)
        self._uniform: float | None = None  # known after the first evaluation
        self._predictions: Tensor | None = None  # likewise

    def first(self, count: int) -> Objective:
        """The same loss on the first batches alone, as many as `count` examples fill: a cheaper, noisier one."""
        fewer = copy.copy(self)
        fewer.batches, fewer.seen = [], 0
        for batch in self.batches:
            if fewer.seen < count:
                fewer.batches.append(batch)
                fewer.seen += batch.size
        fewer.scale = self.num_examples / fewer.seen
        fewer._uniform = fewer._predictions = None
        return fewer

    def evaluate(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        """Losses (see `losses`) and confusion counts (see `confusion`) in one pass over the batches."""
        losses, counts, ignorance = [], None, 0.0
        predictions = []
        with self._evaluating(), torch.no_grad():
            placed = self._seats.placed(weights)
            for index, batch in enumerate(self.batches):
                try:
                    reading = self._read(placed, index)
                except OutputNotFiniteError:
                    losses.append(torch.full((batch.size,), math.inf, dtype=torch.float64))
                    continue
                ignorance += self._ignorance(reading)
                predictions.append(_counted(reading))
                losses.append(-self._log_prob(reading).double().cpu())
                found = self._counts(reading)
                counts = found if counts is None or found is None else counts + found
        if self._uniform is None:
            self._uniform = ignorance / self.seen
            self._predictions = torch.cat(predictions) if len(predictions) == len(losses) else None
        return torch.cat(losses), counts

    def losses(self, weights: Weights) -> Tensor:
        """(seen,) negative log-likelihood of each example, in nats, float64; inf where the outputs overflow."""
        return self.evaluate(weights)[0]

    def loss(self, weights: Weights) -> float:
        """The summed loss over N examples, in nats."""
        return float(self.losses(weights).sum()) * self.scale

    def confusion(self, weights: Weights) -> Tensor | None:
        """(C, C) counts, row = label, column = most probable class; None where outputs are no classes (or over 1,000)."""
        return self.evaluate(weights)[1]

    def _ignorance(self, reading: Reading) -> float:
        """Nats that a uniform guess loses on one batch."""
        if isinstance(self._likelihood, Categorical):
            return math.log(reading.view.shape[2]) * reading.count()
        return math.log(2) * reading.count() if isinstance(self._likelihood, Bernoulli) else math.inf

    def _counts(self, reading: Reading) -> Tensor | None:
        classes = reading.view.shape[2]
        if not isinstance(self._likelihood, Categorical) or classes > 1000 or reading.labels is None:
            return None
        counted = (
            torch.ones_like(reading.labels, dtype=torch.bool) if reading.valid is None else reading.valid
        )
        index = reading.labels[counted] * classes + reading.view.argmax(-1)[counted]
        return torch.bincount(index, minlength=classes * classes).view(classes, classes)

    def accuracy(self, weights: Weights) -> float | None:
        """Share of predictions whose most probable class is the label; None where outputs are no classes."""
        counts = self.confusion(weights)
        return None if counts is None else float(counts.diagonal().sum() / counts.sum().clamp(min=1))

    def uniform_loss(self) -> float:
        """Nats per example of a guess that knows nothing: log C for each prediction that counts; inf for regression."""
        if self._uniform is None:
            self.evaluate({})
        assert self._uniform is not None
        return self._uniform

    def predictions(self) -> Tensor | None:
        """(seen,) how many predictions of each example count (a language model's tokens); None where every example has one."""
        self.uniform_loss()
        found = self._predictions
        return None if found is None or bool((found == 1).all()) else found

    def gradient(self, weights: Weights) -> dict[str, Tensor]:
        """Gradient of the summed loss (true labels) by parameter name, in nats per unit of weight.

        A tied parameter appears once. Parameters that the loss does not reach have a zero gradient.
        """
        placed = self._seats.placed(weights)
        leaves = {name: leaf.requires_grad_(True) for name, leaf in self._seats.leaves(placed).items()}
        total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        with self._evaluating():
            for index in range(len(self.batches)):
                reading = self._read(self._seats.spread(placed, leaves), index)
                loss = -self._log_prob(reading).sum()
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for value, gradient in zip(total.values(), gradients, strict=True):
                    if gradient is not None:
                        value.add_(gradient)
        return {name: value.mul_(self.scale) for name, value in total.items()}

    def ggn_products(self, weights: Weights, directions: Sequence[Weights]) -> Tensor:
        """u_i' H u_j for K directions, H = sum_n J_n' Lambda_n J_n the GGN of the summed loss at `weights`: exact.

        K forward-mode derivatives a batch; Lambda_n is the Hessian of the loss in the outputs (see `output_hessian`).

        Args:
            weights: theta_t by name.
            directions: K vectors by parameter name; a parameter that is absent does not move.

        Returns:
            (K, K) float64, in nats.

        Raises:
            ValueError: a likelihood whose output Hessian is not known.
        """
        placed = self._seats.placed(weights)
        moves = [self._seats.moves(direction) for direction in directions]
        total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        with self._evaluating(), torch.no_grad():
            for index in range(len(self.batches)):
                products, readings = [], []
                for move in moves:
                    reading, tangent = self._jvp(placed, move, index)
                    readings.append(reading)
                    products.append(tangent)
                total += output_hessian(self._likelihood, readings[0], torch.stack(products))
        return total * self.scale

    def expand(self, weights: Weights, direction: Weights) -> tuple[float, float, float]:
        """(l, g'u, u'Hu) of the summed loss at `weights` along u: its value, slope, and GGN curvature, exact.

        One forward-mode derivative a batch gives all three, where slope and curvature apart take a backward pass more.

        Args:
            weights: by name.
            direction: u by parameter name; a parameter that is absent does not move.

        Returns:
            Nats.

        Raises:
            ValueError: a likelihood whose output Hessian is not known.
        """
        placed, move = self._seats.placed(weights), self._seats.moves(direction)
        loss = slope = bend = 0.0
        with self._evaluating(), torch.no_grad():
            for index in range(len(self.batches)):
                reading, tangent = self._jvp(placed, move, index)
                with torch.enable_grad():
                    outputs = reading.output.detach().requires_grad_(True)
                    nll = -self._log_prob(replace(reading, output=outputs)).sum(dtype=torch.float64)
                    (residual,) = torch.autograd.grad(nll, outputs)
                loss += float(nll)
                slope += float((self._as_viewed(residual, reading) * tangent).sum(dtype=torch.float64))
                bend += float(output_hessian(self._likelihood, reading, tangent[None]))
        return loss * self.scale, slope * self.scale, bend * self.scale

    def _jvp(self, placed: Tensors, move: Tensors, index: int) -> tuple[Reading, Tensor]:
        """The outputs of one batch and their derivative along a direction, (B, T, C)."""
        leaves = {name: leaf for name, leaf in self._seats.leaves(placed).items() if name in move}
        tangents = {name: move[name].to(leaf) for name, leaf in leaves.items()}
        rest: list[Reading] = []

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            reading = self._read(self._seats.spread(placed, parameters), index)
            rest.append(reading)
            value: Tensor = reading.output
            return value

        tangent = torch.func.jvp(outputs, (leaves,), (tangents,))[1]
        check_hessian(self._likelihood)
        return rest[-1], self._as_viewed(tangent, rest[-1])

    def _as_viewed(self, values: Tensor, reading: Reading) -> Tensor:
        """Values in the outputs' shape, as (B, T, C)."""
        shape = reading.view.shape
        if shape[2] == 1:
            return values.reshape(shape)
        return values.movedim(getattr(self._likelihood, "class_dim", -1), -1).reshape(shape)

    def _read(self, placed: Tensors, index: int) -> Reading:
        """The module's answer on one batch, with these tensors in place of its own."""
        batch = self.batches[index]
        output = functional_call(self.module, placed, batch.args, batch.kwargs, tie_weights=False)
        if not _all_finite(find_logits(output).detach()):
            raise OutputNotFiniteError(
                f"the outputs are NaN or infinite in batch {index}: these weights have no finite loss"
            )
        if self._likelihood is None:
            self._likelihood = infer_likelihood(self.module, output, batch)
        return self._likelihood.read(output, batch)

    def _log_prob(self, reading: Reading) -> Tensor:
        assert self._likelihood is not None  # the first reading infers it
        return self._likelihood.log_prob(reading)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode, bare layers, and kernels of attention and of experts that have a forward-mode derivative."""
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        experts = getattr(getattr(self.module, "config", None), "_experts_implementation", None) or "eager"
        module: Any = self.module
        try:
            if experts != "eager":
                module.set_experts_implementation("eager")
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                yield
        finally:
            if experts != "eager":
                module.set_experts_implementation(experts)
            for part, training in modes:
                part.training = training


def _counted(reading: Reading) -> Tensor:
    """(B,) number of predictions that count, of each example."""
    batch, width = reading.view.shape[:2]
    if reading.valid is None:
        return torch.full((batch,), float(width), dtype=torch.float64)
    return reading.valid.sum(1).double().cpu()


def _all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: by their sum, which is one pass, and one by one where that overflows."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
