"""One run of an estimator: the model made ready, its likelihood and plan, and the sums that batches add to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from estimators.batches import Batch
from estimators.gradients import Workspace
from estimators.inference import infer_likelihood
from estimators.likelihood import Likelihood, Reading, Seed
from estimators.per_example import Engine
from estimators.plan import Plan, make_plan
from estimators.randomness import uniforms

log = logging.getLogger(__name__)


@dataclass
class Problem:
    """What every estimator works on.

    Attributes:
        model: frozen and in eval mode while the run lasts.
        parameters: the trainable ones, by name; a tied one once.
        likelihood: None until the first batch tells.
        samples, seed, standard_error, gradient, reduction, labels: the user's options.
        sums: named accumulators; everything in it adds up over batches and ranks.
        label_kind: what `info["labels"]` will say.
        draws: how many squares were added per example (samples or columns that are averaged).
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    likelihood: Likelihood | None
    samples: int = 1
    seed: int = 0
    standard_error: bool = False
    gradient: bool = False
    reduction: str = "example"
    labels: str = "auto"
    sums: dict[str, Tensor] = field(default_factory=dict)
    label_kind: str = ""
    draws: int = 1
    columns: int | None = None
    predictions: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    engine: Engine | None = None
    plan: Plan | None = None
    space: Workspace = field(default_factory=Workspace)

    def read(self, batch: Batch) -> Reading:
        """Forward of one batch with the engine listening, and what its likelihood reads off the outputs.

        Raises:
            ValueError: from the model's plan, or a sequence longer than the model takes.
        """
        assert self.engine is not None
        return self._read(
            with_length_check(partial(self.engine.forward, self.model, batch), self.model, batch), batch
        )

    def likelihood_for(self, output: Any, batch: Batch) -> Likelihood:
        """The given likelihood, or the one that the first batch calls for."""
        if self.likelihood is None:
            self.likelihood = infer_likelihood(self.model, output, batch)
            log.info("likelihood: %s", self.likelihood.name)
        return self.likelihood

    def uniforms(self, batch: Batch, draw: int) -> Any:
        """The stream of random numbers of one draw of labels for a batch."""
        return lambda count: uniforms(self.seed, draw, batch.first, batch.size, count)

    def _read(self, output: Any, batch: Batch) -> Reading:
        return self.likelihood_for(output, batch).read(output, batch)

    def probe_seed(self, output: Any, batch: Batch) -> Seed:
        """Any informative gradient at the outputs, to find where the examples lie."""
        reading = self._read(output, batch)
        assert self.likelihood is not None
        return self.likelihood.sampled(reading, self.uniforms(batch, 2**40))

    @contextmanager
    def planned(self) -> Iterator[ExitStack]:
        """Hooks stay on while this is open; `ensure_plan` puts them on."""
        with ExitStack() as stack:
            yield stack

    def ensure_plan(self, batch: Batch, hooks: ExitStack) -> None:
        """Make the plan at the first batch, and again at the first one of two or more examples."""
        if self.plan is not None and (self.plan.rows > 1 or batch.size == 1):
            return
        hooks.close()
        make = partial(make_plan, self.model, self.parameters, batch, self.probe_seed)
        self.plan = with_length_check(make, self.model, batch)
        self.engine = Engine(self.plan.units)
        hooks.enter_context(self.engine.attached())
        general = self.plan.general()
        if general:
            self.notes["general_path"] = ", ".join(general)
        if self.plan.unused:
            self.notes["unused_parameters"] = ", ".join(self.plan.unused)


def with_length_check(run: Any, model: nn.Module, batch: Batch) -> Any:
    """Run; an index error of a sequence longer than the model takes becomes a clear one.

    Raises:
        ValueError: the sequence is longer than the model's positions.
    """
    try:
        return run()
    except (IndexError, RuntimeError) as error:
        config = getattr(model, "config", None)
        longest = getattr(config, "max_position_embeddings", None)
        length = batch.ids.shape[1] if batch.ids is not None and batch.ids.dim() == 2 else 0
        if (
            isinstance(longest, int) and length > longest - 2
        ):  # RoBERTa counts two positions that it cannot use
            raise ValueError(
                f"batch {batch.index} has sequences of {length} tokens, the model takes {longest} positions; truncate them"
            ) from error
        raise


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, tied ones once.

    Raises:
        ValueError: there is none.
    """
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: requires_grad is False on all of them; "
            "curvature is estimated for those that require gradients"
        )
    return found


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode, frozen parameters, no caches, no fused shortcuts; everything as it was afterwards, even on an error."""
    training = [(module, module.training) for module in model.modules()]
    frozen = [(value, value.requires_grad) for value in model.parameters()]
    configs = [
        c
        for c in (getattr(m, "config", None) for m in model.modules())
        if getattr(c, "use_cache", False) is True
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for value, _ in frozen:
            value.requires_grad_(False)
        for config in configs:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for config in configs:
            config.use_cache = True
        for value, required in frozen:
            value.requires_grad_(required)
        for module, mode in training:
            module.training = mode
