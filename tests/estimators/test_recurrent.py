"""Recurrent nets are unrolled into their products: exact for every kind of them, and left to the general path else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradmatch.estimators import estimate
from tests import oracle
from tests.estimators.architectures import B, plain


class Net(nn.Module):
    """Predicts from the sequence, from the last states, or both, with a first state or without."""

    def __init__(self, rnn, reads, state):
        super().__init__()
        self.rnn, self.reads, self.state = rnn, reads, state
        size = rnn.proj_size or 5
        if "sequence" in reads:
            self.head = nn.Linear(2 * size if rnn.bidirectional else size, 3)
        if "state" in reads:
            self.last = nn.Linear(size + 5 if isinstance(rnn, nn.LSTM) else size, 3)

    def forward(self, x):
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        given = ()
        if self.state:
            rows = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
            examples = x.shape[0 if self.rnn.batch_first else 1]
            first = torch.linspace(-1, 1, rows * 5).view(rows, 1, 5).repeat(1, examples, 1).to(x)
            given = ((first, 2 * first) if isinstance(self.rnn, nn.LSTM) else first,)
        out, last = self.rnn(x, *given)
        out = out if self.rnn.batch_first else out.transpose(0, 1)
        last = torch.cat(last, 2) if isinstance(last, tuple) else last
        seen = self.head(out).mean(1) if "sequence" in self.reads else 0
        return seen + (self.last(last[-1]) if "state" in self.reads else 0)


def compared(rnn, reads="sequence and state", state=False, steps=7, **options):
    torch.manual_seed(0)
    batch = plain(steps, 4)
    model = Net(rnn.double(), reads, state).double()
    for value in model.parameters():
        nn.init.normal_(value, std=0.5)
    loss = lambda m, row: F.cross_entropy(m(row["x"]), row["labels"])  # noqa: E731
    gradients = oracle.per_example_gradients(model, batch, loss)
    found = estimate(
        model, [(batch["x"], batch["labels"])], method="empirical_fisher", progress=False, **options
    )
    return found, gradients


KINDS = {
    "rnn": nn.RNN, "relu": lambda *sizes, **given: nn.RNN(*sizes, nonlinearity="relu", **given), "gru": nn.GRU, "lstm": nn.LSTM,
}  # fmt: skip
FORMS = {
    "one layer": {"batch_first": True},
    "time first, both ways, two layers": {"num_layers": 2, "bidirectional": True},
    "without biases": {"batch_first": True, "num_layers": 2, "bias": False},
}


@pytest.mark.parametrize("reads", ["sequence", "state", "sequence and state"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exact(kind, form, state, reads):
    found, gradients = compared(KINDS[kind](4, 5, **FORMS[form]), reads, state)
    assert found.info["general_path"] == "rnn (unrolled)"
    assert oracle.relative_l1(found, oracle.mean_of_squares(gradients)) < 1e-10


def test_standard_errors_and_gradients():
    found, gradients = compared(nn.LSTM(4, 5, batch_first=True), standard_error=True, gradient=True)
    errors, total = oracle.standard_error_of_squares(gradients), oracle.sum_of(gradients)
    assert oracle.relative_l1({name: found.standard_error(name) for name in found}, errors) < 1e-9
    assert oracle.relative_l1({name: found.gradient(name) for name in found}, total) < 1e-9


@pytest.mark.parametrize("batch_first", [True, False])
def test_as_many_steps_as_examples(batch_first):
    found, gradients = compared(nn.GRU(4, 5, batch_first=batch_first), steps=B)
    assert oracle.relative_l1(found, oracle.mean_of_squares(gradients)) < 1e-10


class Clipped(nn.GRU):
    """Not torch's own any more."""

    def forward(self, x):
        out, last = super().forward(x)
        return out.clamp(-0.1, 0.1), last


@pytest.mark.parametrize("rnn", [lambda: Clipped(4, 5), lambda: nn.LSTM(4, 5, proj_size=3)])
def test_what_is_not_torchs_own_runs_one_by_one(rnn):
    found, gradients = compared(rnn())
    assert found.info["general_path"] == "rnn (one by one)"
    assert oracle.relative_l1(found, oracle.mean_of_squares(gradients)) < 1e-10
