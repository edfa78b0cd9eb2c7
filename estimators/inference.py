"""Which likelihood a model and its batches call for, where the user did not say."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from gradmatch.estimators.batches import Batch
from gradmatch.estimators.categorical import Categorical
from gradmatch.estimators.errors import GradmatchError
from gradmatch.estimators.general import differentiable
from gradmatch.estimators.likelihood import (
    LOGITS,
    Likelihood,
    OwnLikelihood,
    checked_logits,
    field_of,
)
from gradmatch.estimators.names import choose
from gradmatch.estimators.values import Bernoulli, Gaussian, Own

log = logging.getLogger(__name__)

LIKELIHOODS = (
    "auto", "classification", "bernoulli", "causal_lm", "masked_lm", "seq2seq", "token_classification", "regression",
)  # fmt: skip
ALIASES = {"multi_label": "bernoulli", "gaussian": "regression", "categorical": "classification"}
HEADS = (
    ("ForTokenClassification", "token_classification"),
    ("ForSemanticSegmentation", "segmentation"),
    ("ForMaskedLM", "masked_lm"),
    ("MaskedLMHeadModel", "masked_lm"),
    ("ForCausalLM", "causal_lm"),
    ("LMHeadModel", "causal_lm"),
    ("ForConditionalGeneration", "causal_lm"),  # of images and text, say; seq2seq where there is an encoder
    ("ForSeq2SeqLM", "seq2seq"),
)
NUMBERED = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)


def make_likelihood(given: str | Any) -> Likelihood | None:
    """The likelihood of a name or of a user's object; None for "auto", which needs a batch."""
    if isinstance(given, (Categorical, Bernoulli, Gaussian, Own)):
        return given
    if isinstance(given, str):
        name = ALIASES.get(given, given)
        choose("likelihood", name, LIKELIHOODS)
        if name == "auto":
            return None
        return {"bernoulli": Bernoulli, "regression": Gaussian}.get(name, lambda: Categorical(name))()
    if isinstance(given, OwnLikelihood):
        return Own(given)
    raise TypeError(
        f"likelihood must be a name ({', '.join(LIKELIHOODS)}) or an object with sample(output, generator) and "
        f"log_prob(output, labels), got {type(given).__name__}"
    )


def infer_likelihood(model: nn.Module, output: Any, batch: Batch) -> Likelihood:
    """HF models by their head and problem type; other modules by the shapes of outputs and labels."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    name = type(inner).__name__
    if name.endswith("ForQuestionAnswering") or field_of(output, "start_logits") is not None:
        raise GradmatchError(
            f"{name} predicts where an answer starts and where it ends, and no likelihood of ours covers both: pass your own "
            "with sample(output, generator) and log_prob(output, labels)",
            "bad_batch",
            name,
        )
    logits, labels = checked_logits(output, batch), batch.labels
    others = differentiable(output)[1:]
    if others and all(field_of(output, key) is None for key in LOGITS):
        log.warning(
            "the model returns %s tensors: the first, of shape %s, is taken for the predictions, the others for by-products; "
            "if they are trained too, pass your own likelihood", len(others) + 1, list(logits.shape),
        )  # fmt: skip
    if hasattr(inner, "config"):
        both_sides = bool(getattr(inner.config, "is_encoder_decoder", False))
        for ending, kind in HEADS:
            if name.endswith(ending):
                if kind == "segmentation":
                    return Categorical("token_classification", class_dim=1)
                return Categorical("seq2seq" if kind == "causal_lm" and both_sides else kind)
        if name.endswith(NUMBERED):
            return _by_problem_type(inner.config, labels)
        if both_sides and logits.dim() == 3:
            return Categorical("seq2seq")
    return _by_shape(logits, labels)


def _by_problem_type(config: Any, labels: Tensor | None) -> Likelihood:
    """HF's own rule: config.problem_type, else one label is regression, whole-number labels are classes."""
    kind = getattr(config, "problem_type", None)
    if kind is None:
        if getattr(config, "num_labels", 2) == 1:
            kind = "regression"
        elif labels is not None and labels.is_floating_point():
            kind = "multi_label_classification"
    if kind == "regression":
        return Gaussian()
    return Bernoulli() if kind == "multi_label_classification" else Categorical("classification")


def _by_shape(logits: Tensor, labels: Tensor | None) -> Likelihood:
    shape = list(logits.shape)
    if labels is None:
        if logits.dim() == 2 and shape[1] > 1:
            return Categorical("classification")
    elif labels.is_floating_point():
        if labels.numel() == logits.numel():
            if bool(((labels == 0) | (labels == 1)).all()):
                log.warning(
                    'all targets are 0.0 or 1.0 and are read as numbers (likelihood="regression"); for yes/no labels pass '
                    'likelihood="bernoulli"'
                )
            elif bool((labels >= 0).all()) and bool(((labels.sum(-1) - 1).abs() < 1e-3).all()):
                log.warning(
                    'all targets sum to 1 and are read as numbers (likelihood="regression"); for probabilities of classes pass '
                    'likelihood="classification"'
                )
            return Gaussian()
    elif logits.dim() > 3 and list(labels.shape) == [
        shape[0],
        *shape[2:],
    ]:  # images of labels, classes second
        return Categorical("token_classification", class_dim=1)
    elif logits.dim() == 3 and shape[1] == shape[2] and list(labels.shape) == shape[:2]:
        raise GradmatchError(
            f"logits of shape {shape} may hold the classes of {list(labels.shape)} labels in dimension 1 or 2: pass "
            'likelihood=Categorical("token_classification", class_dim=1), or class_dim=-1',
            "bad_batch",
        )
    elif (shape[-1] > 1 and list(labels.shape) == shape[:-1]) or (
        logits.dim() == 2 and labels.numel() == shape[0] and shape[1] > 1
    ):
        return Categorical("classification" if logits.dim() == 2 else "token_classification")
    elif logits.dim() > 2 and list(labels.shape) == [shape[0], *shape[2:]]:
        return Categorical("token_classification", class_dim=1)
    elif labels.numel() == logits.numel():
        return Bernoulli()
    found = "no labels" if labels is None else f"labels {labels.dtype} of shape {list(labels.shape)}"
    raise GradmatchError(
        f"cannot tell the likelihood from logits of shape {shape} and {found}; pass likelihood= one of "
        f"{', '.join(LIKELIHOODS[1:])}, or an object with sample and log_prob",
        "bad_batch",
    )
