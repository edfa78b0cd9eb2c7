"""Losses, gradients and exact GGN products against dense float64 oracles."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradmatch.estimators.inference import make_likelihood
from gradmatch.measure import curving
from gradmatch.measure.curving import output_hessian
from gradmatch.measure.objective import Objective, OutputNotFiniteError, _all_finite


def weights_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def direction(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in module.named_parameters()}


def flat(vector, module):
    return torch.cat([vector[name].flatten() for name, _ in module.named_parameters()])


def dense_ggn(module, weights, batches, lam):
    """sum_n J_n' Lambda_n J_n by one Jacobian an example; lam(outputs (C,)) -> (C, C)."""
    names = [name for name, _ in module.named_parameters()]
    total = None
    for x, _ in batches:
        for row in x:

            def outputs(*parameters, row=row):
                return torch.func.functional_call(
                    module, dict(zip(names, parameters, strict=True)), (row[None],)
                )[0]

            parameters = tuple(weights[name] for name in names)
            blocks = torch.autograd.functional.jacobian(outputs, parameters)
            jacobian = torch.cat([block.flatten(1) for block in blocks], 1)
            part = jacobian.T @ lam(outputs(*parameters)) @ jacobian
            total = part if total is None else total + part
    return total


def softmax_lambda(f):
    p = f.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


CASES = [
    ("classification", lambda: (torch.randn(5, 3).double(), torch.randint(4, (5,))), softmax_lambda, "auto"),
    (
        "bernoulli",
        lambda: (torch.randn(5, 3).double(), torch.randint(2, (5, 4))),
        lambda f: torch.diag(f.sigmoid() * (1 - f.sigmoid())),
        "bernoulli",
    ),
    (
        "regression",
        lambda: (torch.randn(5, 3).double(), torch.randn(5, 4).double()),
        lambda f: torch.eye(4).double(),
        "auto",
    ),
]


@pytest.mark.parametrize(("name", "batch", "lam", "likelihood"), CASES, ids=[case[0] for case in CASES])
def test_ggn_products_equal_the_dense_ggn(name, batch, lam, likelihood):
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    batches = [batch(), batch()]
    objective = Objective(module, batches, num_examples=50, likelihood=likelihood)
    weights = weights_of(module)
    directions = [direction(module, seed) for seed in range(3)]
    u = torch.stack([flat(d, module) for d in directions])
    expected = 50 / 10 * u @ dense_ggn(module, weights, batches, lam) @ u.T
    torch.testing.assert_close(objective.ggn_products(weights, directions), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "batch", "lam", "likelihood"), CASES, ids=[case[0] for case in CASES])
def test_an_expansion_is_the_loss_its_slope_and_the_dense_ggn(name, batch, lam, likelihood):
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    batches = [batch(), batch()]
    objective = Objective(module, batches, num_examples=50, likelihood=likelihood)
    weights, u = weights_of(module), direction(module, 1)
    step = 1e-5
    ahead, behind = ({n: w + s * u[n] for n, w in weights.items()} for s in (step, -step))
    loss, slope, bend = objective.expand(weights, u)
    assert loss == pytest.approx(objective.loss(weights), rel=1e-12)
    assert slope == pytest.approx((objective.loss(ahead) - objective.loss(behind)) / (2 * step), rel=1e-6)
    v = flat(u, module)
    assert bend == pytest.approx(float(50 / 10 * v @ dense_ggn(module, weights, batches, lam) @ v), rel=1e-10)


def test_loss_and_gradient_equal_slow_loops():
    module = nn.Linear(3, 4).double()
    x, y = torch.randn(7, 3).double(), torch.randint(4, (7,))
    objective = Objective(module, [(x[:4], y[:4]), (x[4:], y[4:])], num_examples=70)
    weights = weights_of(module)
    losses = []
    gradient = torch.zeros(4, 3).double()
    for row, label in zip(x, y, strict=True):
        logits = [
            sum(a * b for a, b in zip(w, row, strict=True)) + c
            for w, c in zip(module.weight, module.bias, strict=True)
        ]
        scale = sum(math.exp(float(f.detach())) for f in logits)
        losses.append(math.log(scale) - float(logits[label].detach()))
        for k in range(4):
            gradient[k] += (math.exp(float(logits[k].detach())) / scale - int(k == label)) * row
    torch.testing.assert_close(objective.losses(weights), torch.tensor(losses, dtype=torch.float64))
    assert objective.loss(weights) == pytest.approx(10 * sum(losses))
    torch.testing.assert_close(objective.gradient(weights)["weight"], 10 * gradient)
    assert objective.uniform_loss() == pytest.approx(math.log(4))
    counts = objective.confusion(weights)
    assert counts.sum() == 7
    assert objective.accuracy(weights) == pytest.approx(float((module(x).argmax(1) == y).double().mean()))


def test_weights_come_from_the_mapping_and_the_module_stays_as_it_is():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before = weights_of(module)
    objective = Objective(module, [(torch.randn(6, 3), torch.randint(2, (6,)))])
    other = {name: value + 1 for name, value in before.items()}
    first = objective.losses(other)
    torch.testing.assert_close(objective.losses(other), first)  # no dropout: eval mode
    assert not torch.allclose(objective.losses(before), first)
    objective.gradient(other)
    assert all(layer.training for layer in module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_first_examples_stand_for_all():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(3)]
    objective = Objective(module, batches, num_examples=60)
    few = objective.first(5)
    assert (few.seen, few.num_examples, few.scale, objective.seen) == (8, 60, 7.5, 12)
    assert few.loss({}) == pytest.approx(60 * float(objective.losses({})[:8].mean()))


def test_regression_has_no_classes():
    module = nn.Linear(2, 1)
    objective = Objective(module, [(torch.randn(3, 2), torch.randn(3, 1))])
    assert objective.confusion({}) is None
    assert objective.accuracy({}) is None
    assert objective.uniform_loss() == math.inf


def test_weights_that_overflow_have_an_infinite_loss():
    module = nn.Linear(3, 2)
    objective = Objective(module, [(torch.randn(4, 3), torch.randint(2, (4,)))])
    weights = {**weights_of(module), "bias": torch.tensor([math.inf, 0.0])}
    assert torch.isinf(objective.losses(weights)).all()
    with pytest.raises(OutputNotFiniteError, match="in batch 0"):
        objective.gradient(weights)


def hf_models():
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    small = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    return {
        "bert": lambda: BertForSequenceClassification(BertConfig(**small, num_labels=3)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
        ),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**small)),
    }


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_ggn_products_of_transformers_equal_finite_differences(name):
    """u'Gu = sum over predictions of the variance of J u under p; J u by central differences in float64, padding excluded."""
    module = hf_models()[name]().double().eval()
    ids = torch.randint(1, 50, (4, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = torch.randint(3, (4,)) if name == "bert" else ids.masked_fill(mask == 0, -100)
    objective = Objective(module, [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    weights = weights_of(module)
    u = direction(module, 0)
    found = float(objective.ggn_products(weights, [u])[0, 0])

    def logits(step):
        moved = {n: weights[n] + step * u[n] for n in u}
        with torch.no_grad():
            return torch.func.functional_call(
                module, moved, (), {"input_ids": ids, "attention_mask": mask}
            ).logits

    h = 1e-5
    products, p = (logits(h) - logits(-h)) / (2 * h), logits(0.0).softmax(-1)
    variance = (p * products.square()).sum(-1) - (p * products).sum(-1).square()
    if name != "bert":
        variance = variance[:, :-1] * (labels[:, 1:] != -100)
    assert found == pytest.approx(float(variance.sum()), rel=1e-4)  # rotary angles and norms stay in float32


def test_errors():
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no batches"):
        Objective(module, [])
    with pytest.raises(ValueError, match="no labels"):
        Objective(module, [(torch.randn(3, 2),)]).loss({})

    class Poisson:
        name = "poisson"

        def sample(self, output, generator):
            return torch.poisson(output.exp())

        def log_prob(self, output, labels):
            return (labels * output - output.exp()).sum(1)

    objective = Objective(module, [(torch.randn(3, 2), torch.ones(3, 2))], likelihood=Poisson())
    weights = weights_of(module)
    assert objective.losses(weights).shape == (3,)
    with pytest.raises(ValueError, match="'poisson' has no known Hessian"):
        objective.ggn_products(weights, [weights])
    assert output_hessian.__doc__.startswith("sum over examples")


@pytest.mark.parametrize("chunk", [1, 50, 2**18])
def test_products_are_taken_a_few_predictions_at_a_time_and_padding_not_at_all(monkeypatch, chunk):
    monkeypatch.setattr(curving, "CHUNK", chunk)
    outputs, products = torch.randn(2, 3, 7), torch.randn(2, 2, 3, 7)  # (B, T, C), (K, B, T, C)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    outputs[~valid] = math.nan  # what stands there is looked at by nobody
    reading = SimpleNamespace(view=outputs, valid=valid)
    found = output_hessian(make_likelihood("token_classification"), reading, products)
    rows = [
        (softmax_lambda(f.double()), v.double())
        for f, v in zip(outputs[valid], products[:, valid].transpose(0, 1), strict=True)
    ]
    torch.testing.assert_close(found, sum(v @ h @ v.T for h, v in rows))


def test_values_whose_sum_overflows_are_finite_all_the_same():
    assert _all_finite(torch.full((4,), 3e38))
    assert not _all_finite(torch.tensor([1.0, math.nan]))
    assert not _all_finite(torch.tensor([math.inf, -math.inf]))
