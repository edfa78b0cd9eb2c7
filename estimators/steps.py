"""What one step of a Trainer did to the gradient that Adam squared, and the factor that undoes it.

Adam's v_hat is a mean of g^2 over steps. With g = s sum_n g_n, the sum over the E examples of a step, the batch form of
the Fisher (per example) is E[(sum_n g_n)^2] / E = v_hat / (s^2 E), so the factor is 1 / (s^2 E):

    loss of a step                                               s                factor
    mean over examples of -log p                                 1 / E            E
    mean over E x K outputs of squared errors or yes/no losses   2 / (E K), 1 / (E K)     E (K / 2)^2, E K^2
    the same, not divided by the A passes of a step              A / E            E / A^2
    mean over T predicted tokens                                 1 / T            T^2 / E, T in no file of the run

and clipping at the norm c makes a step of norm n smaller by min(1, c / n): undone on the whole, for the logged norms
tell how much of the mean square is left.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.inference import HEADS, NUMBERED
from gradmatch.estimators.trainer import Run

ADAMS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_hf", "adamw_apex_fused",
)  # fmt: skip
TOKENS = tuple(ending for ending, _ in HEADS)
# logged norms, the error they may leave, and windows of Adam's mean that count
FEWEST, LARGEST_ERROR, WINDOWS = (8, 0.1, 5)


@dataclass
class Units:
    """How v_hat becomes curvature.

    Attributes:
        factor: of v_hat, per example.
        error: relative, of the factor, from the norms that were not logged.
        assumed: what it rests on, in words for `info`.
        unknown: what stands against it, in words for an error.
    """

    factor: float = 1.0
    error: float = 0.0
    assumed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def has_own_loss(model: nn.Module) -> bool:
    """Whether it is a model of transformers that computes a loss from labels."""
    return hasattr(_inner(model), "config") and bool(
        re.search(r"For[A-Z]|LMHead", type(_inner(model)).__name__)
    )


def own_loss(model: nn.Module) -> tuple[str, float | None]:
    """The loss that a model of transformers computes from labels, and its factor 1 / (s E); None where no file tells it."""
    inner: Any = _inner(model)
    name, config = type(inner).__name__, getattr(inner, "config", None)
    if config is None:
        return f"the loss of {name}, which is no model of transformers", None
    if getattr(config, "output_router_logits", False) is True:
        return f"the loss of {name} with that of its router", None
    if name.endswith(NUMBERED):
        outputs = int(getattr(config, "num_labels", 2))
        kind = getattr(config, "problem_type", None) or (
            "regression" if outputs == 1 else "single_label_classification"
        )
        if kind == "regression":
            return f"the mean of squared errors over {outputs} outputs (twice -log p)", outputs / 2
        if kind == "multi_label_classification":
            return f"a mean over {outputs} yes/no outputs", float(outputs)
        return "a mean over examples", 1.0
    if name.endswith(TOKENS):
        return (
            f"the loss of {name} is a mean over predicted tokens, and no file tells how many a step had",
            None,
        )
    return f"the loss of {name}", None


def of_run(
    run: Run, model: nn.Module, batch_size: int, num_examples: int, trace: float, beta2: float, steps: float
) -> Units:
    """Units of a Trainer's run; `trace` is that of v_hat over everything that was trained."""
    optim = str(run.arguments.get("optim", ADAMS[0])).lower()
    if optim not in ADAMS:
        raise GradmatchError(
            f"the run in {run.folder} trained with optim={optim!r}: only of AdamW ({', '.join(ADAMS[:2])}) is the second moment a "
            "mean of squared gradients in full precision",
            "optimizer_state",
        )
    found = Units(unknown=list(run.unknown))
    words, share = own_loss(model)
    if share is None:
        found.unknown.append(words)
    else:
        share *= _undivided(run, model, found)
        effective = usual_batch(num_examples, batch_size, bool(run.arguments.get("dataloader_drop_last")))
        found.factor = effective * share**2
        found.assumed.append(f"{words}, of the model's own, {batch_size} examples a step")
    _clipping(run, trace, beta2, steps, found)
    return found


def usual_batch(num_examples: int, batch_size: int, drop_last: bool = False) -> float:
    """Examples a step, with the short last step of every epoch: 1 / mean(1 / size), as the noise of a mean goes."""
    whole, rest = divmod(num_examples, batch_size)
    if not rest or (drop_last and whole):
        return float(batch_size)
    return (whole + 1) / (whole / batch_size + 1 / rest)


def _inner(model: nn.Module) -> nn.Module:
    base = getattr(model, "get_base_model", None)
    found: nn.Module = base() if callable(base) else model
    return found


def _undivided(run: Run, model: nn.Module, found: Units) -> float:
    """1 / (s E) of heads whose loss is not divided by passes or processes, although the Trainer counts on it.

    The Trainer leaves that to heads whose forward takes further keywords; many take them and ignore num_items_in_batch,
    so that gradients add up over the passes of a step. Which heads do is read off the installed version, and holds for a
    run of the same version alone.
    """
    import transformers

    together = run.processes * max(1, int(run.arguments.get("_n_gpu") or 1))
    if run.accumulation == 1 and together == 1:
        return 1.0
    here = transformers.__version__
    if run.version.split(".")[:2] != here.split(".")[:2]:
        found.unknown.append(
            f"how {run.accumulation} passes a step on {together} devices add up depends on the version of transformers: the "
            f"run's is {run.version or 'not known'}, here it is {here}"
        )
        return 1.0
    forward = type(_inner(model)).forward
    keywords = [
        each.kind is inspect.Parameter.VAR_KEYWORD for each in inspect.signature(forward).parameters.values()
    ]
    if not getattr(_inner(model), "accepts_loss_kwargs", any(keywords)):
        return 1.0
    single = (getattr(_inner(model).config, "problem_type", None) or "single").startswith("single")
    if single and re.search(r"loss_function\([^)]*\*\*", inspect.getsource(forward)):
        return 1.0
    averaged = together if run.arguments.get("average_tokens_across_devices") else 1
    found.assumed.append(
        f"gradients summed, not averaged, over {run.accumulation} passes and {averaged} processes (this head ignores num_items_in_batch)"
    )
    return 1 / (run.accumulation * averaged)


def _clipping(run: Run, trace: float, beta2: float, steps: float, found: Units) -> None:
    """Undo it on the whole: sum_s w_s n_s^2 / sum_s w_s min(n_s, c)^2 with Adam's weights w_s, from the logged norms n_s."""
    limit = run.max_grad_norm
    if not run.arguments:
        return  # already among what is not known
    if limit <= 0:
        found.assumed.append("gradients not clipped (max_grad_norm 0)")
        return
    said = f"gradients are clipped (max_grad_norm {limit:g})"
    window = min(steps, WINDOWS / (1 - beta2)) if beta2 < 1 else steps
    norms = {run.steps - step: norm for step, norm in run.norms.items() if 0 <= run.steps - step < window}
    complete = len(norms) >= window
    if len(norms) < FEWEST and not complete:
        found.unknown.append(
            f"{said}, and {len(norms)} of the last {window:.0f} norms were logged (grad_norm in trainer_state.json; "
            "logging_steps=1 logs all)"
        )
        return
    weights = {age: beta2**age for age in norms}
    before = {age: norm**2 for age, norm in norms.items()}
    after = {age: min(norm, limit) ** 2 for age, norm in norms.items()}
    ratio, error = _ratio(weights, before, after, 0 if complete else 1 - len(norms) / window)
    level, spread = _ratio(
        weights, after, dict.fromkeys(norms, 1.0), 0 if complete else 1 - len(norms) / window
    )
    if error > LARGEST_ERROR:
        found.unknown.append(
            f"{said}, and the {len(norms)} logged norms of {window:.0f} tell by how much only to {100 * error:.0f} %"
        )
    elif abs(trace / level - 1) > 0.1 + 4 * spread:
        found.unknown.append(
            f"{said}, but the mean square of the logged norms after clipping is {level:.3g}, the second moments add up to {trace:.3g}: "
            "what was logged is not what the optimizer was given"
        )
    else:
        found.factor *= ratio
        found.error = error
        found.assumed.append(
            f"{said}: undone by {ratio:.4g}, from {len(norms)} of the last {window:.0f} norms, of which {sum(before[a] > after[a] for a in norms)} were above"
        )


def _ratio(
    weights: Mapping[int, float], above: Mapping[int, float], below: Mapping[int, float], unseen: float
) -> tuple[float, float]:
    """sum w a / sum w b, and its relative standard error as a ratio estimate of a sample; `unseen` is the share not seen."""
    total = math.fsum(weights[k] * below[k] for k in weights)
    ratio = math.fsum(weights[k] * above[k] for k in weights) / total
    count = len(weights)
    rest = math.fsum((weights[k] * (above[k] - ratio * below[k])) ** 2 for k in weights)
    return ratio, math.sqrt(unseen * rest * count / max(1, count - 1)) / (ratio * total) if ratio else 0.0
