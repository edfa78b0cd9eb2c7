"""One run of an estimator: the model made ready, its likelihood and plan, and the sums that batches add to."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.handlers import find_handler, transposed_linear
from gradmatch.estimators.inference import infer_likelihood
from gradmatch.estimators.likelihood import Likelihood, Reading, Seed, find_logits
from gradmatch.estimators.memory import parts, raise_if_full
from gradmatch.estimators.per_example import Engine
from gradmatch.estimators.plan import Plan, make_plan
from gradmatch.estimators.products import Workspace
from gradmatch.estimators.randomness import uniforms
from gradmatch.estimators.values import Own

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Problem:
    """What every estimator works on.

    Attributes:
        model: frozen and in eval mode while the run lasts.
        parameters: the trainable ones, by name; a tied one once.
        likelihood: None until the first batch tells.
        samples, seed, standard_error, gradient, reduction, labels, kfac_form: the user's options.
        chunk, budget: rows, or bytes of working memory, of the parts in which batches are worked on; None is no limit.
        sums: named accumulators; everything in it adds up over batches and ranks.
        counts: examples, batches and predictions seen; units and examples behind the standard errors.
        label_kind: what `info["labels"]` will say; empty until it is settled.
        columns: of the exact expectation over labels, or None where labels are sampled.
        draws: how many squares are averaged per example.
        likelihood_name: of the likelihood, once it is known; also where other ranks or an interrupted run knew it.
        notes: more lines for `info`.
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
    kfac_form: str = "expand"
    chunk: int | None = None
    budget: int | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    label_kind: str = ""
    columns: int | None = None
    draws: int = 1
    likelihood_name: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    engine: Engine | None = None
    plan: Plan | None = None
    space: Workspace = field(default_factory=Workspace)
    hooks: ExitStack = field(default_factory=ExitStack)

    @property
    def device(self) -> torch.device:
        """Where the first parameter is; batches go there."""
        return next(iter(self.parameters.values())).device

    @property
    def known_likelihood(self) -> Likelihood:
        """The likelihood, after the first forward."""
        assert self.likelihood is not None
        return self.likelihood

    @property
    def listening(self) -> Engine:
        """The engine, after `ensure_plan`."""
        assert self.engine is not None
        return self.engine

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """A batch in the parts in which it is worked on."""
        rows = self.chunk or batch.size
        if self.budget is not None and batch.size > 1:
            self.ensure_plan(batch)
            assert self.plan is not None
            rows = self.plan.rows_within(self.budget, batch)
        return parts(batch, rows)

    def forward(self, batch: Batch) -> Any:
        """Forward of one batch with the engine listening."""
        self.ensure_plan(batch)
        return with_length_check(partial(self.listening.forward, self.model, batch), self.model, batch)

    def read(self, batch: Batch) -> Reading:
        """The same, and what the likelihood reads off the outputs."""
        output = self.forward(batch)
        reading = self.likelihood_for(output, batch).read(output, batch)
        self.counts["predictions"] += reading.count()
        return reading

    def likelihood_for(self, output: Any, batch: Batch) -> Likelihood:
        """The given likelihood, or the one that the first batch calls for."""
        if self.likelihood is None:
            self.likelihood = infer_likelihood(self.model, output, batch)
            log.info("likelihood: %s", self.likelihood.name)
        self.likelihood_name = self.likelihood.name
        return self.likelihood

    def uniforms(self, batch: Batch, draw: int) -> Callable[[int], Tensor]:
        """The stream of random numbers of one draw of labels for a batch."""
        return lambda count: uniforms(self.seed, draw, batch.first, batch.size, count, batch.stride)

    def ensure_plan(self, batch: Batch) -> None:
        """Make the plan at the first batch, and again at the first one of two or more examples; hooks go on."""
        if self.plan is not None and (self.plan.rows > 1 or batch.size == 1):
            return
        self.hooks.close()
        make = partial(make_plan, self.model, self.parameters, batch, self._probe_seed)
        self.plan = with_length_check(make, self.model, batch)
        self.engine = Engine(self.plan.units)
        self.hooks.enter_context(self.engine.attached())
        general = self.plan.general()
        if general:
            self.notes["general_path"] = ", ".join(general)
        if self.plan.unused:
            self.notes["unused_parameters"] = ", ".join(self.plan.unused)

    def is_transposed(self, name: str) -> bool:
        """Whether a weight is kept as (in, out); told by its module, since a rank may have seen no batch."""
        module, _, local = name.rpartition(".")
        return local == "weight" and find_handler(self.model.get_submodule(module)) is transposed_linear

    def _probe_seed(self, output: Any, batch: Batch) -> Seed:
        """A gradient at the outputs that reaches every example, ignored labels or not, to find where the examples lie."""
        if self.label_kind == "none":
            logits = find_logits(output)
        else:
            likelihood = self.likelihood_for(output, batch)
            reading = likelihood.read(output, batch)
            if isinstance(likelihood, Own):  # only it knows what its output is
                return likelihood.sampled(reading, self.uniforms(batch, 2**40))
            logits = reading.output
        return logits, torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)


def with_length_check(run: Callable[[], T], model: nn.Module, batch: Batch) -> T:
    """Run; an index error of a sequence longer than the model takes becomes a clear one."""
    try:
        return run()
    except (IndexError, RuntimeError) as error:
        raise_if_full(error)
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        length = batch.ids.shape[1] if batch.ids is not None and batch.ids.dim() == 2 else 0
        if (
            isinstance(longest, int) and length > longest - 2
        ):  # RoBERTa counts two positions that it cannot use
            raise GradmatchError(
                f"batch {batch.index} has sequences of {length} tokens, the model takes {longest} positions; truncate them",
                "bad_batch",
            ) from error
        raise


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, tied ones once."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not found:
        raise GradmatchError(
            f"{type(model).__name__} has no trainable parameter: requires_grad is False on all of them; "
            "curvature is estimated for those that require gradients",
            "bad_batch",
        )
    return found


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode, frozen parameters, no caches, no fused shortcuts; everything as it was afterwards, even on an error."""
    training = [(module, module.training) for module in model.modules()]
    frozen = [(value, value.requires_grad) for value in model.parameters()]
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in configs if getattr(config, "use_cache", False) is True]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for value, _ in frozen:
            value.requires_grad_(False)
        for config in configs:
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for config in configs:
            config.use_cache = True
        for value, required in frozen:
            value.requires_grad_(required)
        for module, mode in training:
            module.training = mode
