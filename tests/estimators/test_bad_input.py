"""Everything that can be wrong with a model, its batches or the options: a clear error, and the model as it was."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from gradmatch import estimators
from gradmatch.estimators import Gaussian, estimate
from tests.estimators.architectures import DECODER, ENCODER, mlp, tokens

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])


def frozen():
    return mlp().requires_grad_(False)


def not_a_number():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return model


class BatchStatistics(nn.Module):
    """BatchNorm that keeps no statistics uses those of the batch even in eval mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2, track_running_stats=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x[:, None])).flatten(1))


class AlwaysDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 64), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(F.dropout(self.inner(x), 0.5, training=True))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        return self.head(checkpoint(self.inner, self.first(x), use_reentrant=True))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x).detach()


class Returns(nn.Module):
    """Whatever one likes, made of a linear layer's output."""

    def __init__(self, make):
        super().__init__()
        self.inner, self.make = nn.Linear(4, 3), make

    def forward(self, x):
        return self.make(self.inner(x))


class CrossExample:
    def sample(self, output, generator):
        return torch.zeros(len(output), dtype=torch.long)

    def log_prob(self, output, labels):
        return torch.log_softmax(output - output.mean(0), 1)[:, 0]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x.mul_(2))


class Bare(nn.Module):
    """A parameter of the model itself, and an output that hides its tensor."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return SimpleNamespace(logits=self.inner(x) * self.scale)


class WrongShape(CrossExample):
    def log_prob(self, output, labels):
        return output


class NotANumber(CrossExample):
    def log_prob(self, output, labels):
        return output[:, 0] * float("nan")


class Parameterless:
    """An object that is no likelihood."""


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(**ENCODER))


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))


def ids(length=6):
    return tokens(length=length)


TRUE = {"method": "empirical_fisher"}
# what is wrong -> (model, batches, options, error, message)
CASES = {
    "unknown method": (mlp, [(X, Y)], {"method": "fischer"}, ValueError, "unknown method 'fischer' .did you mean 'fisher'"),
    "unknown reduction": (mlp, [(X, Y)], {"reduction": "mean"}, ValueError, "reduction is 'mean'; choose one of example, batch"),
    "unknown labels": (mlp, [(X, Y)], {"labels": "sample"}, ValueError, "labels is 'sample' .did you mean 'sampled'"),
    "unknown backend": (mlp, [(X, Y)], {"backend": "jax"}, ValueError, "backend is 'jax'; choose one of engine, backpack"),
    "unknown form": (mlp, [(X, Y)], {"kfac_form": "expanded"}, ValueError, "did you mean 'expand'"),
    "unknown likelihood": (mlp, [(X, Y)], {"likelihood": "casual_lm"}, ValueError, "did you mean 'causal_lm'"),
    "far from any likelihood": (mlp, [(X, Y)], {"likelihood": "zzz"}, ValueError, "choose one of auto, classification"),
    "no likelihood": (mlp, [(X, Y)], {"likelihood": Parameterless()}, TypeError, r"sample\(output, generator\)"),
    "samples": (mlp, [(X, Y)], {"samples": 0}, ValueError, "samples must be at least 1"),
    "samples no number": (mlp, [(X, Y)], {"samples": "2"}, TypeError, "samples must be a whole number, got '2'"),
    "seed no number": (mlp, [(X, Y)], {"seed": 1.5}, TypeError, "seed must be a whole number, got 1.5"),
    "chunk": (mlp, [(X, Y)], {"chunk": 0}, ValueError, "chunk is a number of rows, at least 1, got 0"),
    "chunk of no memory": (mlp, [(X, Y)], {"chunk": "0 GB"}, ValueError, 'an amount of memory .*, got "?\'0 GB'),
    "chunk of nonsense": (mlp, [(X, Y)], {"chunk": "half"}, ValueError, 'an amount of memory .*, got "?\'half'),
    "tolerance": (mlp, [(X, Y)], {"tolerance": 5}, ValueError, "relative error between 0 and 1"),
    "N": (mlp, [(X, Y)], {"num_examples": 0}, ValueError, "num_examples must be at least 1"),
    "N no number": (mlp, [(X, Y)], {"num_examples": 2.5}, TypeError, "must be a whole number"),
    "batch form of ggn": (mlp, [(X, Y)], {"method": "ggn", "reduction": "batch"}, ValueError, 'right only for method="fisher"'),
    "error bars of kfac": (mlp, [(X, Y)], {"method": "kfac", "standard_error": True}, ValueError, "standard_error is not available"),
    "gradient of gram": (mlp, [(X, Y)], {"method": "gram", "gradient": True}, ValueError, "gradient is not available"),
    "one example's error": (mlp, [(X[:1], Y[:1])], {"standard_error": True}, ValueError, "needs at least two examples"),
    "exact tokens": (llama, [{"input_ids": ids()}], {"labels": "exact"}, ValueError, 'labels="exact" is out of reach'),
    "exact of one's own": (mlp, [(X, Y)], {"labels": "exact", "likelihood": WrongShape()}, ValueError, "must give one number per example"),
    "no trainable parameter": (frozen, [(X, Y)], {}, ValueError, "Sequential has no trainable parameter"),
    "no linear layer": (
        lambda: nn.Sequential(nn.LayerNorm(4)), [(X, Y)], {"method": "gram"}, ValueError, "no trainable linear layer",
    ),
    "NaN": (not_a_number, [(X, Y)], {}, ValueError, "NaN or infinite in batch 0, row 0"),
    "NaN among the inputs": (mlp, [(X * float("nan"), Y)], {}, ValueError, "NaN or infinite in batch 0, row 0"),
    "NaN of one's own": (mlp, [(X, Y)], {**TRUE, "likelihood": NotANumber()}, ValueError, "log_prob of NotANumber is NaN"),
    "no batches": (mlp, [], {}, ValueError, "ended without yielding"),
    "empty batch": (mlp, [(X[:0], Y[:0])], {}, ValueError, "batch 0 is empty"),
    "second batch empty": (mlp, [(X, Y), (X[:0], Y[:0])], {}, ValueError, "batch 1 is empty"),
    "no tensor": (mlp, [{"labels": Y}], {}, ValueError, "batch 0 holds no input tensor"),
    "no batch": (mlp, ["text"], {}, TypeError, "batch 0 is a str"),
    "no labels": (mlp, [X], TRUE, ValueError, "batch 0 has no labels"),
    "no labels for a gradient": (mlp, [X], {"gradient": True}, ValueError, "batch 0 has no labels"),
    "no targets": (mlp, [X], {**TRUE, "likelihood": "regression"}, ValueError, "batch 0 has no labels"),
    "no labels of one's own": (mlp, [X], {**TRUE, "likelihood": CrossExample()}, ValueError, "mixes the examples|has no labels"),
    "no labels to mask": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), [{"input_ids": ids()}], {}, ValueError, "masked_lm needs labels",
    ),
    "label too large": (mlp, [(X, Y + 5)], TRUE, ValueError, "label 5 is out of range, the model has classes 0 to 2"),
    "label negative": (mlp, [(X, Y - 1)], TRUE, ValueError, "label -1 is out of range"),
    "labels of another number": (mlp, [(X, Y[:3])], {"likelihood": "classification"}, ValueError, r"needs whole-number labels of shape \[4\]"),
    "labels that are fractions": (mlp, [(X, Y.float())], {"likelihood": "classification"}, ValueError, "got torch.float32"),
    "targets of another number": (mlp, [(X, torch.randn(4, 2))], {"likelihood": "regression"}, ValueError, "do not fit outputs"),
    "no probabilities": (mlp, [(X, torch.full((4, 3), 2.0))], {"likelihood": "bernoulli"}, ValueError, "must lie in 0 .. 1"),
    "all ignored": (mlp, [(X, torch.full((4,), -100))], {**TRUE, "likelihood": "classification"}, ValueError, "all labels are ignored"),
    "all ignored by the Hessian": (
        mlp, [(X, torch.full((4,), -100))], {"method": "hessian", "likelihood": "classification"}, ValueError, "all labels are ignored",
    ),
    "compiled": (
        lambda: torch.jit.script(mlp()), [(X, Y)], {}, TypeError, "compiled by torch.jit, which takes no hooks",
    ),
    "a loss for logits": (
        lambda: Returns(lambda h: h.sum()), [(X, Y)], {}, ValueError, "a single number is a loss, not a prediction",
    ),
    "soft labels of another shape": (
        mlp, [(X, torch.rand(4, 2))], {"likelihood": "classification"}, ValueError, "or probabilities in the logits' shape",
    ),
    "soft labels that do not sum to one": (
        mlp, [(X, torch.rand(4, 3))], {"likelihood": "classification"}, ValueError, "at least 0 and sum to 1 over the classes",
    ),
    "undecidable": (mlp, [(X, torch.randn(4, 2))], {}, ValueError, "cannot tell the likelihood from logits of shape"),
    "undecidable without labels": (lambda: nn.Linear(4, 1), [X], {}, ValueError, "and no labels; pass likelihood="),
    "logits without classes": (
        lambda: Returns(lambda h: h[:, 0]), [(X, Y)], {"likelihood": "classification"}, ValueError, 'likelihood="bernoulli"',
    ),
    "one class": (
        lambda: nn.Linear(4, 1), [(X, Y % 2)], {"likelihood": "classification"}, ValueError, "has one class, whose probability",
    ),
    "one class without labels": (lambda: nn.Linear(4, 1), [X], {"likelihood": "classification"}, ValueError, "has one class"),
    "logits of other rows": (
        lambda: Returns(lambda h: h[:2]), [(X, Y)], {}, ValueError, r"examples but the model returned logits of shape \[2, 3\]",
    ),
    "a scalar loss": (lambda: Returns(lambda h: h.sum()), [(X, Y)], {"likelihood": "classification"}, ValueError, "the first dimension must be"),
    "no logits": (lambda: Returns(str), [(X, Y)], {}, TypeError, "found no logits in the model's output of type str"),
    "detached": (Detached, [(X, Y)], {}, ValueError, "depends on no trainable parameter"),
    "mixing module": (BatchStatistics, [(X, Y)], {}, ValueError, r"mixes the examples .* is norm \(BatchNorm1d\)"),
    "mixing likelihood": (mlp, [(X, Y)], {"likelihood": CrossExample(), **TRUE}, ValueError, "mixes the examples .* log_prob"),
    "dropout": (AlwaysDropout, [(X, Y)], {}, ValueError, r"two runs of the model .* differ, first at head \(Linear\)"),
    "input changed in place": (InPlace, [(X.clone(), Y)], {}, ValueError, r"changes its input of shape \[3, 4\] in place"),
    "hidden output": (Bare, [(X, Y)], {}, ValueError, "output of type SimpleNamespace shows no tensor"),
    "one batch": (mlp, (X, Y), {}, TypeError, "`batches` is a single tuple, .* wrap a single one in a list"),
    "one tensor": (mlp, X, {}, TypeError, "`batches` is a single Tensor"),
    "labels in a dict": (mlp, [(X, {"a": Y})], {}, TypeError, "batch 0: labels are a dict"),
    "classes second or last": (
        lambda: Returns(lambda h: h[:, None].expand(-1, 3, 3)), [(X, torch.zeros(4, 3).long())], {}, ValueError,
        "in dimension 1 or 2",
    ),
    "reentrant checkpointing": (Checkpointed, [(X, Y)], {}, ValueError, "reentrant gradient checkpointing"),
    "too long": (bert, [{"input_ids": ids(17), "labels": torch.arange(5) % 3}], {}, ValueError, "sequences of 17 tokens, the model takes 16"),
    "a token that is none": (mlp, [(torch.randn(4, 5), Y)], {}, RuntimeError, "mat1 and mat2"),
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_errors(name):
    build, batches, options, error, message = CASES[name]
    model = build().train()
    before = [value.requires_grad for value in model.parameters()]
    with pytest.raises(error, match=message):
        estimate(model, batches, progress=False, **options)
    assert model.training
    assert [value.requires_grad for value in model.parameters()] == before
    assert all(value.grad is None for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_full_memory_is_not_taken_for_a_missing_derivative(error, monkeypatch):
    def full(*given):
        raise error

    monkeypatch.setattr("gradmatch.estimators.hessian._forward_over_reverse", full)
    with pytest.raises(type(error), match=str(error)):
        estimate(mlp(), [(X, Y)], method="hessian", progress=False)


def test_noise_has_a_positive_variance():
    with pytest.raises(ValueError, match="variance must be positive and finite, got 0"):
        Gaussian(0.0)


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'estimat'"):
        estimators.estimat  # noqa: B018
    assert "estimate" in dir(estimators)


@pytest.mark.parametrize("named", [False, True])
def test_a_second_output_is_pointed_out(named, caplog):
    model = Returns(lambda h: {"logits": h, "hidden": h * 2} if named else (h, h * 2))
    estimate(model, [(X, Y)], progress=False)
    assert ("returns 2 tensors: the first" in caplog.text) == (not named)


def test_float_labels_of_zero_and_one_are_pointed_out(caplog):
    estimate(mlp(), [(X, torch.eye(3)[Y])], progress=False)
    assert 'for yes/no labels pass likelihood="bernoulli"' in caplog.text


def test_float_labels_that_are_probabilities_are_pointed_out(caplog):
    estimate(mlp(), [(X, torch.rand(4, 3).softmax(1))], progress=False)
    assert 'for probabilities of classes pass likelihood="classification"' in caplog.text


def test_columns_that_a_model_does_not_take_are_left_out(caplog):
    batch = {"x": X, "labels": Y, "row": torch.arange(4)}
    model = Returns(lambda h: h)
    assert estimate(model, [batch], progress=False).num_examples == 4
    assert "does not take 'row': left out" in caplog.text
