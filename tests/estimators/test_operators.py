"""Linear operators and Laplace approximations: values by hand, by the libraries themselves where they are installed, and refusals."""

import pytest
import torch
from torch import nn

from gradmatch import Curvature
from gradmatch.estimators import estimate, from_laplace
from gradmatch.estimators.laplace import to_laplace


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def rows(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64), torch.randint(
        2, (count,), generator=generator
    )


class Operator:
    """What an operator of curvlinops offers, of a dense matrix."""

    def __init__(self, matrix, model, loss=None, seen=12):
        self.matrix, self.shape, self._params = matrix, tuple(matrix.shape), list(model.parameters())
        self._loss_func, self._N_data = loss, seen

    def __matmul__(self, vectors):
        return self.matrix @ vectors


def symmetric(model, seed=2):
    size = sum(value.numel() for value in model.parameters())
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T


@pytest.mark.parametrize(("reduction", "factor"), [("mean", 12.0), ("sum", 1.0)])
def test_the_diagonal_in_the_units_of_the_summed_loss(reduction, factor):
    model = net()
    matrix = symmetric(model)
    operator = Operator(matrix, model, nn.CrossEntropyLoss(reduction=reduction))
    found = Curvature.from_operator(operator, model, num_examples=120)
    flat = torch.cat([found.mean(name).flatten() for name in found])
    torch.testing.assert_close(flat, matrix.diagonal() * factor / 12)
    assert (found.num_examples, found.info["examples_seen"]) == (120, "12")
    signs = Curvature.from_operator(operator, model, samples=4000)
    assert (torch.cat([signs.total(n).flatten() for n in signs]) / (flat * 12) - 1).abs().max() < 0.3


def test_parameters_go_by_identity():
    model = net()
    operator = Operator(symmetric(model), model)
    operator._params = operator._params[::-1]
    found = Curvature.from_operator(operator, model, scale=1.0)
    assert list(found) == ["2.bias", "2.weight", "0.bias", "0.weight"]
    dense = Curvature.from_operator(symmetric(model), model, scale=1.0, num_examples=3)
    torch.testing.assert_close(dense.total("0.weight").flatten(), symmetric(model).diagonal()[:15])


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"shape": (3, 3)}, {}, r"shape \[3, 3\], the model 32 trainable weights"),
        ({"_loss_func": nn.MSELoss()}, {}, "units of this operator are not known .its loss is MSELoss"),
        (
            {"_loss_func": nn.CrossEntropyLoss(label_smoothing=0.1)},
            {},
            "units of this operator are not known",
        ),
        ({"_N_data": None}, {"scale": 1.0}, "how many examples it has seen; pass num_examples="),
        (
            {"_params": [nn.Parameter(torch.zeros(2))]},
            {},
            "parameter 0 of the operator is none of the model's",
        ),
    ],
)
def test_operators_that_are_refused(change, options, said):
    model = net()
    operator = Operator(symmetric(model), model, nn.CrossEntropyLoss())
    vars(operator).update(change)
    with pytest.raises(ValueError, match=said):
        Curvature.from_operator(operator, model, **options)


def test_too_many_weights_for_an_exact_diagonal():
    model = nn.Linear(400, 400)
    operator = Operator(torch.zeros(160_400, 1).expand(160_400, 160_400), model)
    with pytest.raises(ValueError, match="takes 160400 products with the operator; pass samples="):
        Curvature.from_operator(operator, model, scale=1.0)


class Kron:
    """What a fitted KronLaplace offers."""

    def __init__(self, model, kfacs, n_data=12):
        self.model, self.n_data, self._H_factor = model, n_data, 2.0
        self.H_facs = type("Kron", (), {"kfacs": kfacs})()


def test_factors_of_laplace_and_back():
    model = net()
    known = estimate(model, [rows()], method="kfac", progress=False)
    kfacs = []
    for name in known:
        a, b = known.factor_a(name), known.factor_b(name)
        kfacs.append([torch.diag(known.total(name))] if a is None else [b * known.num_examples, a])
    found = from_laplace(Kron(model, kfacs))
    for name in known:
        torch.testing.assert_close(found.mean(name), 2 * known.mean(name))
    torch.testing.assert_close(found.factor_b("0.weight"), 2 * known.factor_b("0.weight"))
    with pytest.raises(ValueError, match="factors of 1 parameters, the model has 4"):
        from_laplace(Kron(model, kfacs[:1]))
    with pytest.raises(ValueError, match=r"the factors of '0\.weight' are of 5 weights"):
        from_laplace(Kron(model, [kfacs[1], *kfacs[1:]]))


def test_curvlinops_itself():
    curvlinops = pytest.importorskip("curvlinops")
    model, (x, y) = net(), rows()
    parameters, loss = list(model.parameters()), nn.CrossEntropyLoss()
    ggn = curvlinops.GGNLinearOperator(model, loss, parameters, [(x, y)], check_deterministic=False)
    found = Curvature.from_operator(ggn, model)
    exact = estimate(model, [(x, y)], method="ggn", progress=False)
    for name in exact:
        torch.testing.assert_close(found.total(name), exact.total(name), rtol=1e-6, atol=1e-9)
    kfac = curvlinops.KFACLinearOperator(
        model, loss, parameters, [(x, y)], fisher_type="type-2", separate_weight_and_bias=True, check_deterministic=False
    )  # fmt: skip
    held = Curvature.from_operator(kfac, model)
    dense = kfac @ torch.eye(kfac.shape[0], dtype=torch.float64) * 12
    torch.testing.assert_close(
        torch.cat([held.total(n).flatten() for n in held]), dense.diagonal(), rtol=1e-6, atol=1e-9
    )
    block = torch.kron(held.factor_b("0.weight"), held.factor_a("0.weight")) * held.num_examples
    torch.testing.assert_close(block, dense[:15, :15], rtol=1e-6, atol=1e-9)


def test_laplace_itself():
    laplace = pytest.importorskip("laplace")
    model, (x, y) = net().float(), rows()
    x = x.float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=12)
    for structure in ("kron", "diag"):
        fitted = laplace.Laplace(model, "classification", "all", hessian_structure=structure)
        fitted.fit(loader)
        made = to_laplace(from_laplace(fitted), model, "classification", outputs=2)
        if structure == "diag":
            torch.testing.assert_close(
                made.posterior_precision, fitted.posterior_precision, rtol=1e-4, atol=1e-5
            )
        else:
            torch.testing.assert_close(
                made.H_facs.kfacs[0][1], fitted.H_facs.kfacs[0][1], rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(made(x[:3]), fitted(x[:3]), rtol=0.02, atol=0.02)


def test_a_curvature_of_other_weights_is_no_posterior():
    pytest.importorskip("laplace")
    known = estimate(net(), [rows()], progress=False)
    with pytest.raises(ValueError, match="was taken at other weights"):
        to_laplace(
            known, nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), "classification", outputs=2
        )
    with pytest.raises(ValueError, match="has no two factors"):
        to_laplace(known, net(), "classification", outputs=2, structure="kronecker")
