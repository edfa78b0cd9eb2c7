"""What routers are trained by and looked at by: the scores of a pass, the model's loss, the balance of choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.estimators.errors import GradmatchError
from gradmatch.mixture.routers import Context
from gradmatch.mixture.whole import ModelMixture

if TYPE_CHECKING:
    from torch import Tensor, nn


def loss_of(module: Any, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss on a batch; of text without labels, the tokens are the labels.

    Raises:
        GradmatchError: no labels.
    """
    given = dict(batch)
    if "labels" not in given and hasattr(module, "generate") and "input_ids" in given and _causal(module):
        mask = given.get("attention_mask")
        given["labels"] = (
            given["input_ids"] if mask is None else given["input_ids"].masked_fill(mask == 0, -100)
        )
    if "labels" not in given:
        raise GradmatchError(
            "the batches have no labels, and a router is trained by a loss; give batches with labels",
            "no_labels",
            "batches",
        )
    loss: Tensor = module(**given).loss
    return loss


def _causal(module: Any) -> bool:
    names = getattr(module.config, "architectures", None) or [type(module).__name__]
    return str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))


@contextmanager
def listening(module: nn.Module, soft: bool = False) -> Iterator[list[tuple[str, Tensor, Tensor | None]]]:
    """Scores of every router as a batch passes: (place, (..., experts), mask), grown pass by pass.

    With `soft`, every expert takes part where one alone would.
    """
    context: Context | None = (
        module.context if isinstance(module, ModelMixture) else getattr(module, "gradmatch_context", None)
    )
    if context is not None:
        context.soft = soft
        with context.kept() as kept:
            try:
                yield kept
            finally:
                context.soft = False
        return
    found: list[tuple[str, Tensor, Tensor | None]] = []
    mask: list[Tensor | None] = [None]
    handles, changed = (
        [
            module.register_forward_pre_hook(
                lambda _, args, kwargs: mask.__setitem__(0, kwargs.get("attention_mask")), with_kwargs=True
            )
        ],
        [],
    )
    for name, one in module.named_modules():
        if name.endswith("mlp.gate") and hasattr(one, "top_k"):
            if soft and one.top_k == 1:
                changed.append(one)
                one.top_k = one.num_experts

            def keep(_: Any, args: Any, output: Any, name: str = name) -> None:
                scores = output[0]
                here = (
                    mask[0].reshape(-1)
                    if mask[0] is not None and mask[0].numel() == scores.shape[0]
                    else None
                )
                found.append((name, scores, here))

            handles.append(one.register_forward_hook(keep))
    try:
        yield found
    finally:
        for one in changed:
            one.top_k = 1
        for handle in handles:
            handle.remove()


def balance_loss(scores: Iterable[tuple[str, Tensor, Tensor | None]]) -> Tensor:
    """Mean over the places of E sum_e f_e P_e (Switch Transformers, Eq. 4): 1 where all experts are chosen alike, E where one is.

    >>> even = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    >>> round(float(balance_loss([("a", even, None)])), 3), round(float(balance_loss([("a", even[:1], None)])), 3)
    (1.0, 2.0)
    """
    parts = []
    for _, one, mask in scores:
        shares = one.float().softmax(-1).flatten(0, -2)
        counts = torch.ones(len(shares)) if mask is None else mask.flatten().float()
        chosen = torch.nn.functional.one_hot(shares.argmax(-1), shares.shape[-1]).float()
        f, p = (counts @ chosen / counts.sum(), counts @ shares / counts.sum())
        parts.append(shares.shape[-1] * (f * p).sum())
    return torch.stack(parts).mean() if parts else torch.tensor(0.0)
