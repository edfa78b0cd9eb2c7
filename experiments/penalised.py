"""Stages: fine-tuning with the penalty that the paper assumes (Eq. 8), and how nearly a fine-tune satisfies it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed

from experiments.files import write_json
from experiments.finetune import run, texts_of, training_arguments
from experiments.models import load_classifier, load_tokenizer, save
from experiments.rows import Views, load_split
from gradmatch.estimators import Curvature


def penalty(module: nn.Module, theta0: Mapping[str, Tensor], h0: Mapping[str, Tensor]) -> Tensor:
    """1/2 ||theta - theta0||^2_{H0} = 1/2 sum_i H0_i (theta_i - theta0_i)^2 (Eq. 8), in nats of the summed loss, ()."""
    parameters = dict(module.named_parameters())
    terms = [(h0[name] * (parameters[name] - theta0[name]).square()).sum() for name in h0]
    return torch.stack(terms).sum() / 2


class PenalisedTrainer(Trainer):
    """Trainer of l_t(theta) / N + penalty(theta) / N: Eq. 8, divided by N as every mean loss is."""

    def __init__(self, *args: Any, h0: Mapping[str, Tensor], num_examples: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.h0, self.share = h0, 1 / num_examples  # of an example in the summed loss
        parameters = dict(self.model.named_parameters())
        self.theta0 = {name: parameters[name].detach().clone() for name in h0}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The batch's mean loss plus the penalty's share of an example."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + self.share * penalty(model, self.theta0, self.h0)
        return (loss, outputs) if return_outputs else loss


def finetune_penalised(
    out: Path,
    *,
    data: Views,
    domain: str,
    start: Path,
    base_curvature: Path,
    delta0: float,
    seed: int,
    **training: Any,
) -> None:
    """As `experiments.finetune.finetune` on texts from a run's folder (same order of batches, same schedule), with Eq. 8's penalty.

    H0 = N0 F0 + delta0 is that of the base. Writes `out/model`.
    """
    set_seed(seed)
    model, tokenizer = load_classifier(start / "model"), load_tokenizer(start / "model")
    rows = load_split(data, domain, "train")
    fisher = Curvature.load(base_curvature / "curvature.safetensors")
    device = next(model.parameters()).device
    trainer = PenalisedTrainer(
        model,
        training_arguments(out / "model", seed=seed, **training),
        **texts_of([rows], tokenizer),
        h0={name: (fisher.total(name) + delta0).to(device) for name in fisher},
        num_examples=len(rows),
    )
    run(trainer)
    save(model, out / "model", tokenizer)


def stationarity(
    out: Path, *, base: Path, model: Path, base_curvature: Path, curvature: Path, delta0: float
) -> None:
    """How far a fine-tune is from Eq. 8's condition g_t + H0 tau_t = 0: `out/stationarity.json`, from measured gradients."""
    theta0, theta = (dict(load_classifier(folder / "model").named_parameters()) for folder in (base, model))
    fisher, own = (Curvature.load(folder / "curvature.safetensors") for folder in (base_curvature, curvature))
    squares = dict.fromkeys(("gradient", "pull", "residual", "tau"), 0.0)
    with torch.no_grad():
        for name in fisher:
            g, tau = own.gradient(name), theta[name] - theta0[name]
            assert g is not None  # the curvature stage measures it
            pull = (fisher.total(name) + delta0) * tau
            for key, value in {"gradient": g, "pull": pull, "residual": g + pull, "tau": tau}.items():
                squares[key] += float(value.double().square().sum())
    norms = {key: value**0.5 for key, value in squares.items()}
    write_json(out / "stationarity.json", {**norms, "relative": norms["residual"] / norms["gradient"]})
