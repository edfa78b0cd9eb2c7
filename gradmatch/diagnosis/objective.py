"""One task's loss as a function of the weights: value, gradient, and Jacobian-vector products of a module on data.

The module lends its structure; the weights come from mappings, so that one module serves the base, every fine-tune and
every merge. Losses are negative log-likelihoods in nats, summed over the task's N examples (scaled up from those seen).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED = -100  # the label of a position without loss, as transformers writes it


@dataclass(frozen=True)
class Outputs:
    """What the likelihood sees of one batch.

    Attributes:
        values: (B, P, C) logits, or means of a Gaussian; P positions an example (1 for classification).
        targets: (B, P) class indices, or (B, P, C) real targets.
        mask: (B, P) bool, the positions that count.
        categorical: softmax likelihood, else Gaussian of unit variance.
    """

    values: Tensor
    targets: Tensor
    mask: Tensor
    categorical: bool

    def nll(self) -> Tensor:
        """(B,) negative log-likelihood of each example, in nats; Gaussian up to its constant."""
        if self.categorical:
            safe = self.targets.masked_fill(~self.mask, 0)
            loss = -self.values.log_softmax(-1).gather(-1, safe.unsqueeze(-1)).squeeze(-1)
        else:
            loss = 0.5 * (self.values - self.targets).square().sum(-1)
        return (loss * self.mask).sum(-1)

    def inner(self, jacobian_products: Tensor) -> Tensor:
        """(K, K) sum over examples of (J u_i)' Lambda (J u_j), Lambda the Hessian of the loss in the outputs.

        Lambda = diag(p) - p p' for softmax (so this is the variance-like covariance of the products under p), I for a
        Gaussian of unit variance. jacobian_products: (K, B, P, C). Accumulated in float64.
        """
        products = jacobian_products.double() * self.mask[..., None]
        if self.categorical:
            p = self.values.double().softmax(-1)
            centred = products - (p * products).sum(-1, keepdim=True)
            products = centred * p.sqrt() * self.mask[..., None]
        flat = products.flatten(1)
        return flat @ flat.T


class Objective:
    """The summed loss of one task.

    Args:
        module: any nn.Module; its own weights are never changed, its mode is restored after each use.
        batches: what the module takes, as often as it is asked for: a list of dicts of tensors with "labels", or of
            (inputs, targets) tuples.
        num_examples: N of the summed loss; the number of examples seen where it is None.

    Raises:
        ValueError: no batch, a batch without labels or without examples.
    """

    def __init__(self, module: nn.Module, batches: Iterable[Any], num_examples: int | None = None) -> None:
        self.module = module
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("no batches: the loss needs at least one")
        self.seen = sum(_examples(batch) for batch in self.batches)
        if self.seen == 0:
            raise ValueError("the batches hold no example")
        self.num_examples = num_examples or self.seen
        self.scale = self.num_examples / self.seen

    def losses(self, weights: Mapping[str, Tensor]) -> Tensor:
        """(n,) negative log-likelihood of each example seen, in nats."""
        with self._evaluating(), torch.no_grad():
            return torch.cat([self._outputs(weights, batch).nll().double() for batch in self.batches])

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """The summed loss over N examples, in nats."""
        return float(self.losses(weights).sum()) * self.scale

    def accuracy(self, weights: Mapping[str, Tensor]) -> float | None:
        """Share of positions whose most probable class is the label; None for a Gaussian likelihood."""
        right = total = 0
        with self._evaluating(), torch.no_grad():
            for batch in self.batches:
                outputs = self._outputs(weights, batch)
                if not outputs.categorical:
                    return None
                right += int(((outputs.values.argmax(-1) == outputs.targets) & outputs.mask).sum())
                total += int(outputs.mask.sum())
        return right / total

    def confusion(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """(C, C) counts, row = label, column = predicted class; None for a Gaussian or a vocabulary-sized output."""
        counts: Tensor | None = None
        with self._evaluating(), torch.no_grad():
            for batch in self.batches:
                outputs = self._outputs(weights, batch)
                classes = outputs.values.shape[-1]
                if not outputs.categorical or classes > 1000:
                    return None
                index = outputs.targets[outputs.mask] * classes + outputs.values.argmax(-1)[outputs.mask]
                batch_counts = torch.bincount(index, minlength=classes * classes).view(classes, classes)
                counts = batch_counts if counts is None else counts + batch_counts
        return counts

    def gradient(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient of the summed loss (true labels) by parameter name, in nats per unit of weight.

        Parameters that the loss does not reach have a zero gradient.
        """
        leaves = self._leaves(weights)
        total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        with self._evaluating():
            for batch in self.batches:
                loss = self._outputs({**weights, **leaves}, batch).nll().sum()
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                for name, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        total[name].add_(gradient)
        return {name: value.mul_(self.scale) for name, value in total.items()}

    def ggn_products(self, weights: Mapping[str, Tensor], directions: list[Mapping[str, Tensor]]) -> Tensor:
        """(K, K) u_i' H u_j, H the GGN of the summed loss at `weights`: exact, by K forward-mode derivatives a batch.

        Args:
            weights: theta_t by name.
            directions: K vectors by parameter name; a parameter that is absent does not move.

        Returns:
            (K, K) float64, in nats.
        """
        leaves = {name: leaf.detach() for name, leaf in self._leaves(weights).items()}
        total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        with self._evaluating(), torch.no_grad():
            for batch in self.batches:
                products = []
                for direction in directions:
                    outputs, product = self._jvp(weights, leaves, direction, batch)
                    products.append(product)
                total += outputs.inner(torch.stack(products)).cpu()
        return total * self.scale

    def _jvp(
        self,
        weights: Mapping[str, Tensor],
        leaves: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        batch: Any,
    ) -> tuple[Outputs, Tensor]:
        """The outputs and their derivative (B, P, C) along one direction, by dual numbers."""
        moving = {name: leaf for name, leaf in leaves.items() if name in direction}
        tangents = {name: direction[name].to(leaf) for name, leaf in moving.items()}
        rest: list[Outputs] = []

        def values(parameters: dict[str, Tensor]) -> Tensor:
            rest.append(self._outputs({**weights, **leaves, **parameters}, batch))
            return rest[-1].values

        primal, tangent = torch.func.jvp(values, (moving,), (tangents,))
        return replace(rest[-1], values=primal), tangent

    def _leaves(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One leaf a parameter of the module (a tied one once), with the given values."""
        leaves = {}
        for name, parameter in self.module.named_parameters():
            leaves[name] = weights.get(name, parameter).detach().to(parameter).requires_grad_(True)
        return leaves

    def _outputs(self, weights: Mapping[str, Tensor], batch: Any) -> Outputs:
        """The module's answer on one batch, with `weights` in place of its own (names it lacks are ignored)."""
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        placed = {name: value.to(own[name]) for name, value in weights.items() if name in own}
        device = next(iter(own.values())).device
        if isinstance(batch, Mapping):
            inputs = {key: value.to(device) for key, value in batch.items()}
            targets = inputs["labels"]
            config = getattr(self.module, "config", None)
            if not getattr(config, "is_encoder_decoder", False):
                del inputs["labels"]  # transformers would compute the loss a second time
            return outputs_of(
                functional_call(self.module, placed, (), inputs), targets, causal=is_causal(self.module)
            )
        inputs, targets = batch
        return outputs_of(functional_call(self.module, placed, (inputs.to(device),)), targets.to(device))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            # Fused attention kernels have no forward-mode derivative; the plain ones have.
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                yield
        finally:
            for module, training in modes:
                module.training = training


def outputs_of(result: Any, targets: Tensor, *, causal: bool = False) -> Outputs:
    """Bring a model's answer into the likelihood's form (see `Outputs`).

    Integer targets mean classes, real ones a Gaussian. causal: position p predicts the token at p + 1.
    """
    values = getattr(result, "logits", result)
    if targets.is_floating_point():
        targets = targets.reshape(values.shape)
        values, targets = values[:, None], targets[:, None]
        values, targets = values.flatten(2), targets.flatten(2)
        return Outputs(values, targets, torch.ones(targets.shape[:2], dtype=torch.bool), categorical=False)
    if causal:
        values, targets = values[:, :-1], targets[:, 1:]
    if targets.ndim == 1:
        values, targets = values[:, None], targets[:, None]
    return Outputs(values, targets, targets != IGNORED, categorical=True)


def is_causal(module: nn.Module) -> bool:
    """Whether position p of the outputs predicts token p + 1: transformers' decoder-only language models."""
    return type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _examples(batch: Any) -> int:
    """How many examples a batch holds."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"a batch has no labels (keys {sorted(batch)}); the loss needs true labels")
        return len(batch["labels"])
    return len(batch[1])
