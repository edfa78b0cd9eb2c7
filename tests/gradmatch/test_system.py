"""The one system: every rule of the family against dense float64 references, as a list of beliefs, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gradmatch import RULES, Task, merge, subtract
from gradmatch.estimators import Curvature
from gradmatch.rules.beliefs import BELIEFS, Known
from gradmatch.rules.block import Block
from gradmatch.rules.structures import Basis, Product, common_basis
from gradmatch.rules.system import Belief, posterior, solve
from tests import oracle
from tests.gradmatch.cases import state, tuned

OUT, WIDTH = 5, 7
ALPHAS = (0.7, 0.2, 1.3)
TIGHT = {"tolerance": 1e-14, "iterations": 2000}
BASE_WEIGHT, DELTA0, DAMPING, HOLD = 0.5, 0.01, 0.3, 2.0
OURS = [name for name in BELIEFS if name in RULES]
FILES = [name for name in OURS if RULES[name].needs and name != "regmean"]  # rules of curvature files
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size, seed):
    rows = random(seed, 3 * size, size)
    return rows.T @ rows / len(rows)


def curvature(seed, num_examples, shape, factors, transposed=False, scale=1.0):
    """(Curvature of {"w", "b"}, dense H of the summed loss on w by rows (out, in), diagonal of b)."""
    a, b = positive(WIDTH, seed), scale * positive(OUT, seed + 50)
    diagonal = torch.outer(b.diagonal(), a.diagonal())
    stored = (diagonal.T if transposed else diagonal).reshape(shape).contiguous()
    bias = scale * random(seed, OUT).square() + 0.1
    gradient = {"w": random(seed + 200, *shape), "b": random(seed + 300, OUT)}
    found = Curvature.from_dict(
        {"w": stored, "b": bias}, num_examples, gradient=gradient,
        factor_a={"w": a} if factors else None, factor_b={"w": b} if factors else None,
    )  # fmt: skip
    dense = torch.kron(b, a) if factors else diagonal.flatten().diag()
    return found, num_examples * dense.numpy(), num_examples * bias.numpy()


def case(method, structure, transposed=False, conv=False, alphas=None):
    """What merge is given for one rule, and what theta must come out, by rows of (out, in), and for the bias."""
    alphas = alphas or ((0.7, -0.2, 1.3) if method == "signed" else ALPHAS)
    shape = (OUT, WIDTH, 1, 1) if conv else (WIDTH, OUT) if transposed else (OUT, WIDTH)
    side = (lambda w: w.T.numpy().ravel()) if transposed else (lambda w: w.numpy().ravel())
    factors = structure == "kronecker"
    base = {"w": random(0, *shape), "b": random(1, OUT)}
    models = [
        {n: base[n] + 0.1 * random(10 + t, *v.shape) for n, v in base.items()} for t in range(len(alphas))
    ]
    anchor = {n: base[n] + 0.1 * random(40, *v.shape) for n, v in base.items()}
    known = [
        curvature(t, 10 + t, shape, factors, transposed, 0.02 if method == "removal" else 1.0)
        for t in range(len(alphas))
    ]
    given, h0, h0_bias = curvature(99, 30, shape, factors, transposed)
    floor = 0.0 if RULES[method].damped else DELTA0
    mean = 30 * sum(float(given.mean(n).sum()) for n in base) / sum(v.numel() for v in base.values())
    settings = {"base_weight": BASE_WEIGHT, "delta0": DELTA0}
    if "base_curvature" in RULES[method].needs:
        settings["base_curvature"] = given
    settings |= {"anchor": anchor, "anchor_weight": HOLD} if method == "anchored" else {}
    settings |= {"damping": DAMPING} if RULES[method].damped else {}
    tasks = [Task(m, k[0], a) for m, k, a in zip(models, known, alphas, strict=True)]

    def expected(name, dense0, dense, flat):
        gradients = [flat(k[0].gradient(name)) for k in known]
        return oracle.family(
            method, flat(base[name]), [flat(m[name] - base[name]) for m in models], alphas,
            BASE_WEIGHT * dense0 + floor * np.eye(len(dense0)), dense, gradients, flat(anchor[name]),
            DAMPING * BASE_WEIGHT * mean, DELTA0, HOLD,
        )  # fmt: skip

    bias = expected("b", np.diag(h0_bias), [np.diag(k[2]) for k in known], lambda w: w.numpy())
    return base, tasks, settings, expected("w", h0, [k[1] for k in known], side), bias, side


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ["linear", "conv1d", "convolution"])
@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("method", FILES)
def test_every_rule_of_the_family_is_its_dense_system(method, structure, layout):
    base, tasks, settings, expected, bias, side = case(
        method, structure, layout == "conv1d", layout == "convolution"
    )
    how = {"structure": structure} | ({"solver": "exact", **TIGHT} if structure == "kronecker" else {})
    found = merge(base, tasks, method=method, **settings, **how)
    np.testing.assert_allclose(side(found["w"]), expected, **CLOSE)
    np.testing.assert_allclose(found["b"].numpy(), bias, **CLOSE)
    assert ("w" in found.report.solves) == (structure == "kronecker")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", [name for name in FILES if name not in ("removal", "fisher_base")])
def test_the_eigenbasis_is_exact_for_one_product_and_a_few_steps_near_for_several(method):
    base, tasks, settings, _, _, side = case(method, "kronecker", alphas=(0.7,))
    single = method in ("guarded", "ascent")  # one Kronecker product beside lambda I
    if "base_curvature" in settings and not single:
        settings["base_curvature"] = 3.0
    exact, fast = (
        merge(base, tasks, method=method, **settings, structure="kronecker", solver=s)
        for s in ("exact", "eigenbasis")
    )
    torch.testing.assert_close(fast["w"], exact["w"], **CLOSE)
    assert fast.report.solves["w"]["residual"] < 1e-12
    base, tasks, settings, expected, _, side = case(method, "kronecker")
    fast = merge(base, tasks, method=method, **settings, structure="kronecker")
    wrong = np.linalg.norm(side(fast["w"]) - expected) / np.linalg.norm(expected - side(base["w"]))
    assert wrong < 0.3
    residual = fast.report.solves["w"]["residual"]
    assert (residual < 1e-12) == single
    assert residual < 0.07


@pytest.mark.parametrize("method", [name for name in OURS if RULES[name].kind in ("elementwise", "linear") or name in ("kronecker", "mats", "guarded", "ascent", "anchored")])  # fmt: skip
def test_elementwise_rules_are_their_beliefs(method):
    """The formula that runs and the list of beliefs in BELIEFS are the same rule."""
    n, count = 6, 3
    block = Block(
        theta0=random(0, n), tau=random(1, count, n), alpha=torch.tensor([[0.5], [0.2], [1.3]], dtype=torch.float64), delta0=0.01,
        options={"anchor_weight": 2.0, "keep": 1e-9, "guard": "floor", "hbar_weight": None, "scale": 1.0}, h0=9 + random(2, n).square(),
        h=random(3, count, n).square(), g=random(4, count, n), anchor=random(5, n), damping=0.3,
    )  # fmt: skip
    beliefs, b = BELIEFS[method](Known.of(block))
    found = solve(beliefs, block.theta0[None], b)
    assert found.positive
    rule = RULES[method]
    rule = getattr(rule, "otherwise", rule)
    if rule.kind == "linear":
        alpha = block.alpha.flatten().tolist()
        c0, c, _ = rule.terms(alpha, None, rule.options)
        expected = c0 * block.theta0 + sum(
            ct * (block.theta0 + t) for ct, t in zip(c, block.tau, strict=True)
        )
    else:
        block.options = type("Options", (dict,), {"__getattr__": dict.__getitem__})(block.options)
        expected = rule.elementwise(block)
    torch.testing.assert_close(block.theta0 + found.update.reshape(-1), expected, **CLOSE)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("method", ["actmat", "wudi", "ace"])
def test_rules_without_data_are_their_references(method, shape):
    base = state(0, shapes={"w": shape, "b": (5,)})
    models = [tuned(base, seed) for seed in (1, 2, 3)]
    tasks = [Task(m, weight=a) for m, a in zip(models, ALPHAS, strict=True)]
    found = merge(base, tasks, method=method)
    flat = lambda w: w.numpy().reshape(len(w), -1)  # noqa: E731
    taus = [flat(m["w"] - base["w"]) for m in models]
    expected = oracle.by_task_vectors(method, flat(base["w"]), taus, ALPHAS)
    np.testing.assert_allclose(flat(found["w"]), expected, rtol=1e-8, atol=1e-8)
    mean = sum(a * m["b"] for a, m in zip(ALPHAS, models, strict=True)) / sum(ALPHAS)
    torch.testing.assert_close(found["b"], mean, **CLOSE)
    assert found.report.tensors == {"solve": 1, "linear": 1}
    assert found.report.solves["w"]["residual"] < 1e-10


def test_what_a_factor_does_not_see_is_no_negative_curvature_by_rounding():
    """In float32, of B with few examples the diagonal in another basis came out below 0 by more than delta0."""
    generator = torch.Generator().manual_seed(0)
    rows, wide = (torch.randn(size, count, generator=generator) for size, count in ((40, 3), (60, 60)))
    product = Product(7000.0, a=wide @ wide.T, b=rows @ rows.T, diagonal=1e-6)
    turned = torch.linalg.qr(torch.cat([rows, torch.randn(40, 37, generator=generator)], 1)).Q
    diagonal = Basis(turned, None).diagonal(product, torch.zeros(40, 60))
    assert float(diagonal.min()) >= 0


def test_structures_add_multiply_and_tell_their_diagonal():
    a, b, d = positive(WIDTH, 0), positive(OUT, 1), random(2, OUT, WIDTH).square()
    whole = 2.0 * Product(3.0, a, b, d) + Product(1.5, a=a) + Product(0.5, b=b, diagonal=0.25)
    dense = 6 * torch.kron(b, a) + 2 * d.flatten().diag() + 1.5 * torch.kron(torch.eye(OUT).double(), a)
    dense = dense + 0.5 * torch.kron(b, torch.eye(WIDTH).double()) + 0.25 * torch.eye(OUT * WIDTH).double()
    w = random(3, OUT, WIDTH)
    torch.testing.assert_close(whole(w).flatten(), dense @ w.flatten(), **CLOSE)
    torch.testing.assert_close(Basis(None, None).diagonal(whole, w).flatten(), dense.diagonal(), **CLOSE)
    basis = common_basis(whole, w)
    turned = torch.kron(basis.u, basis.v)
    torch.testing.assert_close(
        basis.diagonal(whole, w).flatten(), (turned.T @ dense @ turned).diagonal(), **CLOSE
    )
    torch.testing.assert_close(basis.back(basis.into(w)), w, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "iterations"), [("diagonal", 0), ("one-sided a", 0), ("one-sided b", 0), ("single", 0), ("sum", 1)]
)  # fmt: skip
def test_closed_forms_are_taken_where_there_are_any(kind, iterations):
    a, b = [positive(WIDTH, t) for t in range(3)], [positive(OUT, 50 + t) for t in range(3)]
    made = {
        "diagonal": [Product(diagonal=random(t, OUT, WIDTH).square() + 0.1) for t in range(3)],
        "one-sided a": [Product(t + 1.0, a=a[t], diagonal=0.1) for t in range(3)],
        "one-sided b": [Product(t + 1.0, b=b[t], diagonal=0.1) for t in range(3)],
        "single": [Product(2.0, a[0], b[0]), Product(diagonal=0.3), Product(diagonal=0.1)],
        "sum": [Product(t + 1.0, a[t], b[t], 0.1) for t in range(3)],
    }[kind]
    beliefs = [
        Belief(w, one, random(70 + t, OUT, WIDTH))
        for t, (w, one) in enumerate(zip(ALPHAS, made, strict=True))
    ]
    b = random(80, OUT, WIDTH)
    found = solve(beliefs, b, b, **TIGHT)
    units = torch.eye(OUT * WIDTH).double().reshape(-1, OUT, WIDTH)
    dense = lambda h: np.stack([h(unit).numpy().ravel() for unit in units])  # noqa: E731
    expected = oracle.one_system(
        [(x.weight, dense(x.precision), x.centre.numpy().ravel()) for x in beliefs], b.numpy().ravel()
    )
    np.testing.assert_allclose(found.update.numpy().ravel(), expected, **CLOSE)
    assert min(1, found.iterations) == iterations
    assert found.residual < 1e-12
    np.testing.assert_allclose(
        dense(posterior(beliefs)), sum(x.weight * dense(x.precision) for x in beliefs), **CLOSE
    )


def test_subtract_by_guard_and_by_ascent():
    shape = (OUT, WIDTH)
    base = {"w": random(0, *shape), "b": random(1, OUT)}
    toxic = {n: v + 0.1 * random(5, *v.shape) for n, v in base.items()}
    given, h0, h0_bias = curvature(99, 30, shape, True)
    lam = 0.1 * (np.trace(h0) + h0_bias.sum()) / (OUT * WIDTH + OUT)
    left = h0 + lam * np.eye(len(h0))
    found = subtract(base, Task(toxic), method="guarded", base_curvature=given, weight=0.8, damping=0.1)
    tau = (toxic["w"] - base["w"]).numpy().ravel()
    np.testing.assert_allclose(
        found["w"].numpy().ravel(),
        base["w"].numpy().ravel() - 0.8 * lam * np.linalg.solve(left, tau),
        **CLOSE,
    )
    bias = base["b"].numpy() - 0.8 * lam * (toxic["b"] - base["b"]).numpy() / (h0_bias + lam)
    np.testing.assert_allclose(found["b"].numpy(), bias, **CLOSE)
    loss, *_ = curvature(3, 12, shape, False)
    found = subtract(
        base, None, method="ascent", base_curvature=given, gradient=loss, weight=0.8, damping=0.1
    )
    g = loss.gradient("w").numpy().ravel()
    np.testing.assert_allclose(
        found["w"].numpy().ravel(), base["w"].numpy().ravel() + 0.8 * np.linalg.solve(left, g), **CLOSE
    )
    diagonal = subtract(
        base, Task(toxic), method="guarded", base_curvature=given, weight=0.8, structure="diagonal"
    )
    h = 30 * given.mean("w")
    torch.testing.assert_close(
        diagonal["w"], base["w"] - 0.8 * lam / (h + lam) * (toxic["w"] - base["w"]), **CLOSE
    )


W = {"w": torch.ones(3, 3)}
FLAT = Curvature.from_dict({"w": torch.zeros(3, 3)}, 5)
REFUSED = [
    ({"method": "anchored", "base_curvature": 1.0}, "anchored needs anchor=..."),
    ({"method": "wudi", "anchor": W}, "wudi takes no anchor"),
    ({"method": "anchored", "base_curvature": 1.0, "anchor": {"w": torch.ones(2, 3)}}, r"the anchor .* has shape \[2, 3\] for 'w', the base \[3, 3\]"),
    ({"method": "guarded"}, "guarded needs the base's curvature"),
    ({"method": "guarded", "base_curvature": 0.0}, "the mean of the diagonal of H0 is 0"),
    ({"method": "guarded", "base_curvature": FLAT}, "the mean of the diagonal of H0 is 0"),
    ({"method": "guarded", "base_curvature": 1.0, "damping": 0.0}, r"damping is 0, it must lie in \(0, inf\]"),
    ({"method": "guarded", "base_curvature": 1.0, "structure": "kronecker"}, "needs curvatures with Kronecker factors"),
    ({"base_curvature": 1.0, "solver": "exact"}, "solver is of matrices .* give structure='kronecker' too"),
    ({"base_curvature": 1.0, "structure": "kronecer"}, r"structure is 'kronecer' \(did you mean 'kronecker'"),
    ({"base_curvature": 1.0, "structure": "kronecker"}, "needs curvatures with Kronecker factors"),
    ({"method": "ascent", "base_curvature": 1.0}, "lacks; estimate it with gradient=True"),
    ({"method": "wudi", "ridge": -1.0}, "ridge is -1"),
]  # fmt: skip


def test_both_signs_in_one_call():
    """What is added by Eq. 12 and what is taken away by the guard, as one dense system; each alone is the rule of its own."""
    base, tasks, settings, expected, bias, side = case("signed", "diagonal")
    plus, away = [tasks[0], tasks[2]], replace(tasks[1], weight=0.2, curvature=None)
    found = subtract(base, away, add=plus, method="guarded", **settings, structure="diagonal")
    np.testing.assert_allclose(side(found["w"]), expected, **CLOSE)
    np.testing.assert_allclose(found["b"].numpy(), bias, **CLOSE)
    assert found.report.removed["removed"] == ["task 1"]
    alone = merge(base, [replace(away, weight=-0.2)], method="signed", **settings)
    guarded = subtract(base, away, method="guarded", **settings)
    added, gm = (
        merge(base, plus, method=m, **{k: v for k, v in settings.items() if k not in drop}, **more)
        for m, drop, more in (
            ("signed", (), {}),
            ("gradient_matching", ("damping", "delta0"), {"delta0": DAMPING * mean_diagonal(base, settings)}),
        )
    )
    for name in base:
        torch.testing.assert_close(alone[name], guarded[name], **CLOSE)
        torch.testing.assert_close(added[name], gm[name], **CLOSE)
    kronecker = case("signed", "kronecker")
    found = merge(kronecker[0], kronecker[1], method="signed", **kronecker[2], solver="exact", **TIGHT)
    np.testing.assert_allclose(side(found["w"]), kronecker[3], **CLOSE)


def mean_diagonal(base, settings):
    given = settings["base_curvature"]
    total = sum(float(given.total(name).sum()) for name in base)
    return settings["base_weight"] * total / sum(value.numel() for value in base.values())


def test_steps_of_an_ascent_take_the_gradient_anew():
    """Two steps on a quadratic loss of what is to go: theta + (a/2)(H0 + lambda)^-1 g, and again from there."""
    base, (h0, h, centre) = (
        {"w": torch.tensor([1.0, -1.0])},
        (2.0, torch.tensor([0.5, 0.1]), torch.tensor([3.0, 0.0])),
    )
    asked = []

    def gradient(weights):
        asked.append(weights["w"].clone())
        return {"w": h * (weights["w"] - centre)}

    given = {"method": "ascent", "gradient": gradient, "base_curvature": h0, "damping": 0.5, "weight": 0.8}
    found = subtract(base, None, steps=2, **given)
    first = base["w"] + 0.4 / 3 * h * (base["w"] - centre)
    torch.testing.assert_close(asked[1], first)
    torch.testing.assert_close(found["w"], first + 0.4 / 3 * h * (first - centre))
    torch.testing.assert_close(
        subtract(base, None, **given)["w"], base["w"] + 0.8 / 3 * h * (base["w"] - centre)
    )


PAIR = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 4}, "a whole number from 1 to 3"),
        ({"steps": 2}, "only ascent takes several"),
        ({"steps": 2, "method": "ascent", "task": None, "gradient": Curvature.from_dict(PAIR, 1, gradient=PAIR)}, "only ascent"),
        ({"method": "ascent", "task": None, "gradient": lambda w: {"w": 0 * w["w"]}}, "gradient on what is to go is zero"),
        ({"method": "ascent", "task": None, "gradient": lambda w: {"w": w["w"] / 0}}, "is not finite at step 1 of 1"),
        ({"add": Task(PAIR, Curvature.from_dict(PAIR, 1))}, "by method='guarded', not by removal"),
        ({"method": "guarded", "add": Task(PAIR, Curvature.from_dict(PAIR, 1), -1.0)}, "needs one above 0"),
        ({"method": "guarded", "add": Task(PAIR)}, "signed needs a curvature"),
    ],
)  # fmt: skip
def test_what_a_removal_refuses(given, said):
    given = {"task": Task({"w": torch.zeros(2)}), "base_curvature": 1.0} | given
    with pytest.raises(ValueError, match=said):
        subtract(PAIR, **given)


@pytest.mark.parametrize(("settings", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_does_not_fit_is_named(settings, text):
    with pytest.raises(ValueError, match=text):
        merge(W, [Task({"w": 2 * torch.ones(3, 3)}, FLAT)], **settings)


@pytest.mark.parametrize(
    ("task", "more", "text"),
    [
        (None, {"method": "guarded"}, "a task is needed"),
        (Task({"w": 2 * torch.ones(3, 3)}), {"method": "guarded", "gradient": FLAT}, "gradient is of method='ascent'"),
        (None, {"method": "ascent"}, "ascent needs gradient="),
        (Task({"w": 2 * torch.ones(3, 3)}), {"method": "ascent", "gradient": FLAT}, "takes a task or gradient"),
    ],
)  # fmt: skip
def test_what_a_subtraction_lacks_is_named(task, more, text):
    with pytest.raises((ValueError, TypeError), match=text):
        subtract(W, task, base_curvature=1.0, **more)


def test_a_singular_sum_names_the_ridge_that_mends_it():
    base = {"w": torch.zeros(2, 5, dtype=torch.float64)}
    tasks = [Task({"w": random(t, 2, 5)}) for t in range(2)]  # four rows for five inputs
    with pytest.raises(ValueError, match=r"'w': .*singular.*ridge"):
        merge(base, tasks, method="actmat", ridge=0.0)
    merged = merge(base, tasks, method="actmat")["w"]
    rows = torch.cat([task.model["w"] for task in tasks])
    outside = merged - merged @ torch.linalg.pinv(rows) @ rows
    assert float(outside.norm()) < 1e-9 * float(merged.norm())  # the update lies where the tasks' do


def test_a_task_that_trained_nothing_has_no_say_in_wudi():
    base = {"w": torch.zeros(3, 3, dtype=torch.float64)}
    one = Task({"w": random(1, 3, 3)})
    both = merge(base, [one, Task(base)], method="wudi")["w"]
    torch.testing.assert_close(both, one.model["w"], rtol=1e-9, atol=1e-9)
    assert not merge(base, [Task(base)] * 2, method="wudi")["w"].any()


def test_the_system_in_a_basis_is_its_reference_and_tsv_m_where_all_curvature_is_flat():
    base, tasks, settings, *_ = case("gradient_matching", "kronecker", alphas=(0.7, 1.2))
    found = merge(base, tasks, method="tsv_basis", **settings, solver="exact", **TIGHT)
    known = [curvature(t, 10 + t, (OUT, WIDTH), True)[1] for t in range(2)]
    h0 = BASE_WEIGHT * curvature(99, 30, (OUT, WIDTH), True)[1] + DELTA0 * np.eye(OUT * WIDTH)
    taus = [(task.model["w"] - base["w"]).numpy() for task in tasks]
    expected = oracle.tsv_basis(base["w"].numpy(), taus, (0.7, 1.2), h0, known)
    np.testing.assert_allclose(found["w"].numpy(), expected, **CLOSE)
    diagonal = merge(base, tasks, method="gradient_matching", **settings)
    torch.testing.assert_close(found["b"], diagonal["b"])
    flat = Curvature.from_dict({n: torch.ones_like(v) for n, v in base.items()}, 3)
    plain = [Task(task.model, flat, task.weight) for task in tasks]
    found = merge(base, plain, method="tsv_basis", base_curvature=2.0)
    size = 1 + 3 * (0.7 + 1.2) / 2  # Hbar / H0
    scaled = merge(base, [Task(t.model, weight=t.weight) for t in tasks], method="tsv_m", scale=2.5 / size)
    torch.testing.assert_close(found["w"], scaled["w"], rtol=1e-5, atol=1e-5)
    still = merge(base, [Task(base, flat)] * 2, method="tsv_basis", base_curvature=2.0)
    assert torch.equal(still["w"], base["w"])


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "consensus", "tsv_basis"])
def test_a_task_of_weight_0_is_no_task(method):
    base, tasks, settings, *_ = case("gradient_matching", "kronecker")
    settings = settings if method == "tsv_basis" else {}
    tasks = [t if settings else Task(t.model, weight=t.weight) for t in tasks]
    idle = Task(tasks[0].model, tasks[0].curvature, 0.0)
    found, without = (
        merge(base, some, method=method, **settings) for some in ([idle, *tasks[1:]], tasks[1:])
    )
    for name in base:
        torch.testing.assert_close(found[name], without[name], **CLOSE)
    still = merge(base, [Task(t.model, t.curvature, 0.0) for t in tasks], method=method, **settings)
    torch.testing.assert_close(still["w"], base["w"], **CLOSE)
