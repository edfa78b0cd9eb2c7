"""Continuations of prompts before and after, for a person to read: a removal is judged by what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradmatch.estimators.errors import GradmatchError

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 24


@dataclass(frozen=True)
class Said:
    """One prompt, and what both models make of it."""

    prompt: str
    before: str
    after: str


def continuations(
    module: nn.Module,
    tokenizer: Any,
    models: Sequence[Mapping[str, Tensor]],
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
    seed: int = 0,
) -> list[list[str]]:
    """One sampled continuation of each prompt by each model (temperature 1, nucleus .9), the same draws for every model.

    Args:
        module: of the models' structure; its weights are given back as they were.
        tokenizer: of transformers.
        models: weights by name; what is absent stays the module's.
        prompts: none of them empty.
        tokens: new ones at most.
        seed: of the draws.

    Raises:
        ValueError: no prompts, or a model whose next token has no probabilities (NaN or infinite logits).
    """
    import torch

    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise GradmatchError("there are no prompts, or one of them is empty", "bad_data", "prompts")
    kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token serves
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
    training = module.training
    found = []
    try:
        module.eval()
        for number, weights in enumerate(models):
            module.load_state_dict({**kept, **weights}, strict=False)
            with torch.no_grad():
                if not bool(torch.isfinite(module(**inputs).logits).all()):
                    raise GradmatchError(
                        f"model {number + 1} of {len(models)} gives no probabilities for a next token (NaN or infinite logits): it "
                        "is broken, and nothing that it says can be compared; lower the strength",
                        "not_finite",
                        "prompts",
                    )
                torch.manual_seed(seed)
                ids = module.generate(  # type: ignore[operator]
                    **inputs, max_new_tokens=tokens, do_sample=True, top_p=0.9, top_k=0, temperature=1.0,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            found.append(
                tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            )
    finally:
        tokenizer.padding_side = side
        module.load_state_dict(kept)
        module.train(training)
    return found


def said(
    module: nn.Module,
    tokenizer: Any,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    prompts: Sequence[str],
    **how: Any,
) -> list[Said]:
    """What the base and the edited model say; arguments and errors as `continuations`."""
    one, other = continuations(module, tokenizer, (before, after), prompts, **how)
    return [Said(*three) for three in zip(prompts, one, other, strict=True)]


def said_table(found: Sequence[Said], spread: float = 0.2, difference: float = 0.03) -> str:
    """The continuations, and how many a comparison of scores would take."""
    from gradmatch.removal.numbers import continuations_needed

    lines = []
    for one in found:
        lines += [f"prompt: {one.prompt!r}", f"  before: {one.before!r}", f"  after:  {one.after!r}"]
    need = continuations_needed(spread, difference)
    lines.append(
        f"{len(found)} continuations are for reading. To see a difference of {difference:g} in the mean of a score whose standard "
        f"deviation is {spread:g} takes about {need} of each model (two-sided 5 %, power 80 %)"
    )
    return "\n".join(lines)
