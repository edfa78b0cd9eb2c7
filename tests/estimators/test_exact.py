"""Every architecture against the float64 loop over single examples."""

import pytest
import torch

from gradmatch.estimators import estimate
from tests import oracle
from tests.estimators.architectures import CASES, as_batches, make

LOOSE = {"mamba": 1e-6}  # transformers' own code rounds a part of it to float32


@pytest.mark.parametrize("name", CASES)
def test_empirical_fisher_and_gradient_of_any_architecture(name):
    model, batch, loss = make(name)
    expected = oracle.per_example_gradients(model, batch, loss)
    found = estimate(
        model, as_batches(batch, 3), method="empirical_fisher", gradient=True, standard_error=True
    )
    squares = oracle.mean_of_squares(expected)
    assert set(found) == set(squares)
    assert oracle.relative_l1(found, squares) < LOOSE.get(name, 1e-9)
    for key, value in squares.items():  # and no single tensor is off
        torch.testing.assert_close(
            found[key], value, rtol=1e-6, atol=LOOSE.get(name, 1e-9) * float(value.max()) + 1e-25
        )
    gradient = oracle.sum_of(expected)
    assert oracle.relative_l1({key: found.gradient(key) for key in found}, gradient) < LOOSE.get(name, 1e-9)
    errors = oracle.standard_error_of_squares(expected)
    assert oracle.relative_l1({key: found.standard_error(key) for key in found}, errors) < 1e-6
