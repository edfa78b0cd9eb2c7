"""Every architecture against the float64 loop over single examples."""

import pytest
import torch
import transformers as tf

from gradmatch.estimators import estimate
from tests import oracle
from tests.estimators.architectures import CASES, DECODER, as_batches, causal_loss, language, make

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


EXPERTS = {
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig, {"num_local_experts": 3}),
    "qwen3 moe": (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, {"num_experts": 3, "moe_intermediate_size": 12, "head_dim": 4}),
}  # fmt: skip


def experts(name, way):
    kind, config, sizes = EXPERTS[name]
    torch.manual_seed(0)
    config = config(
        **DECODER, **sizes, num_key_value_heads=1, num_experts_per_tok=2, experts_implementation=way
    )
    return kind(config).eval()


@pytest.mark.parametrize("name", EXPERTS)
def test_grouped_experts(name):
    """One product for all experts, as transformers runs them by default: it has no forward-mode derivative."""
    model, batch = experts(name, "grouped_mm"), language()
    found = estimate(model, [batch], method="empirical_fisher", progress=False)
    expected = oracle.mean_of_squares(oracle.per_example_gradients(model, batch, causal_loss))
    assert oracle.relative_l1(found, expected) < 1e-5
    hessian, plain = (
        estimate(experts(name, way), [batch], method="hessian", progress=False)
        for way in ("grouped_mm", "eager")
    )
    assert hessian.info["product"] == "backward twice"
    assert oracle.relative_l1(hessian, plain) < 1e-4
