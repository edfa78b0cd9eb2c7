"""Slow, plain, float64 answers to compare with: one example at a time, every definition written out. Nothing of ours.

A *row* is what the model is called with for one example (its keyword inputs, leading dimension 1) and its labels.
"""

import torch


def cut(batch, index):
    """Row `index` of a dict of tensors, as a batch of one."""
    return {key: value[index : index + 1] for key, value in batch.items()}


def size(batch):
    return next(iter(batch.values())).shape[0]


def trainable(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def gradient(model, scalar):
    """Gradient of a scalar with respect to every trainable parameter; zeros where it does not depend on it."""
    parameters = trainable(model)
    found = torch.autograd.grad(scalar, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(value) if g is None else g
        for (name, value), g in zip(parameters.items(), found, strict=True)
    }


def per_example_gradients(model, batch, loss):
    """A list with one dict of gradients per example; loss(model, row) -> scalar."""
    model.eval()
    return [gradient(model, loss(model, cut(batch, n))) for n in range(size(batch))]


def mean_of_squares(gradients):
    """(1/n) sum_n g_n^2."""
    return {name: sum(g[name] ** 2 for g in gradients) / len(gradients) for name in gradients[0]}


def sum_of(gradients):
    return {name: sum(g[name] for g in gradients) for name in gradients[0]}


def standard_error_of_squares(gradients):
    """Usual standard error of the mean of g_n^2 over examples."""
    n = len(gradients)
    stacked = {name: torch.stack([g[name] ** 2 for g in gradients]) for name in gradients[0]}
    return {name: value.std(0) / n**0.5 for name, value in stacked.items()}


def expected_squares(model, batch, logits, covariance):
    """(1/n) sum_n E_y[g_n^2] with one gradient per class or output: sum_ij J_i Lambda_ij J_j, coordinate by coordinate.

    logits(model, row) -> (K,); covariance(logits) -> (K, K), of d(-log p)/d logits under the model's own labels.
    """
    model.eval()
    total = None
    for n in range(size(batch)):
        values = logits(model, cut(batch, n))
        lam = covariance(values.detach())
        jacobian = [gradient(model, value) for value in values]
        square = {
            name: sum(
                lam[i, j] * jacobian[i][name] * jacobian[j][name]
                for i in range(len(values))
                for j in range(len(values))
            )
            for name in jacobian[0]
        }
        total = square if total is None else {name: total[name] + square[name] for name in total}
    return {name: value / size(batch) for name, value in total.items()}


def softmax_covariance(logits):
    """diag(p) - p p'."""
    p = torch.softmax(logits, 0)
    return torch.diag(p) - torch.outer(p, p)


def relative_l1(found, expected):
    """sum |found - expected| / sum |expected| over all tensors."""
    wrong = sum((found[name].double() - expected[name].double()).abs().sum() for name in expected)
    return float(wrong / sum(value.double().abs().sum() for value in expected.values()))
