"""Every rule: against scalar arithmetic, and for the invariants that RULES says it has and lacks."""

import math
from dataclasses import replace

import pytest
import torch

from gradmatch import RULES, Task, merge
from gradmatch.estimators import Curvature
from gradmatch.rules.spherical import karcher, model_stock, nuslerp, slerp
from gradmatch.testing import check_rule
from tests import oracle
from tests.gradmatch.cases import SHAPES, curvature, problem, scalars, state, tuned

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
WHOLE = {"density": 1.0}
NEUTRAL = {  # what turns a method that drops entries into its undisturbed form
    "ties": WHOLE, "dare": WHOLE, "dare_linear": WHOLE, "dare_ties": WHOLE, "breadcrumbs": WHOLE, "breadcrumbs_ties": WHOLE,
    "localize_stitch": WHOLE, "della": WHOLE | {"epsilon": 0.0}, "della_linear": WHOLE | {"epsilon": 0.0},
}  # fmt: skip
OPTIONS = {  # without which a method says nothing, or is by chance symmetric
    "slerp": {"t": 0.3},
    "greedy_soup": {"score": lambda state: 0.0},
    "kronecker": {"tolerance": 1e-13, "iterations": 1000},
}


@pytest.mark.parametrize("method", RULES)
def test_every_rule_keeps_its_promises(method):
    check_rule(RULES[method], **OPTIONS.get(method, {}))


@pytest.mark.parametrize(
    "method", [method for method, rule in RULES.items() if rule.transforms and rule.weighs]
)
def test_invariants_hold_where_nothing_is_dropped(method):
    check_rule(replace(RULES[method], lacks={}), **NEUTRAL[method])


def second_moments(width, generator):
    x = torch.randn(20, width, generator=generator, dtype=torch.float64)
    return x.T @ x / 20


def gram_curvature(model, seed, num_examples, transposed=(), kfac=False):
    """A curvature that holds second moments of every matrix's inputs; with kfac, of the gradients at its outputs too."""
    generator = torch.Generator().manual_seed(seed)
    factors, outputs = {}, {}
    for name, value in model.items():
        if value.dim() >= 2:
            width = value.shape[0] if name in transposed else value[0].numel()
            factors[name] = second_moments(width, generator)
            if kfac:
                outputs[name] = second_moments(len(value), generator)
    mean = {name: torch.ones_like(value) for name, value in model.items()}
    return Curvature.from_dict(mean, num_examples, factor_a=factors, factor_b=outputs)


def same(found, expected):
    return all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-9) for name in expected)


def eq12(theta0, taus, alphas, h0, hs, delta0):
    h0 = h0 + delta0
    bar = h0 + sum(a * h for a, h in zip(alphas, hs, strict=True))
    return theta0 + sum(a * (h0 + h) * t for a, h, t in zip(alphas, hs, taus, strict=True)) / bar


def fisher_base(theta0, taus, alphas, h0, hs, delta0):
    h0 = h0 + delta0
    top = h0 * theta0 + sum(a * h * t for a, h, t in zip(alphas, hs, taus, strict=True))
    return top / (h0 + sum(a * h for a, h in zip(alphas, hs, strict=True)))


def removal(theta0, taus, alphas, h0, hs, delta0):
    h0 = h0 + delta0
    removed = sum(a * h for a, h in zip(alphas, hs, strict=True))
    top = sum(a * (h0 + h) * t for a, h, t in zip(alphas, hs, taus, strict=True))
    return theta0 - top / max(h0 - removed, 0.1 * h0)  # the guard: at least keep * H0 remains


def ewr(theta0, taus, alphas, h0, hs, delta0):
    h0 = h0 + delta0
    top = h0 * theta0 - sum(a * h * t for a, h, t in zip(alphas, hs, taus, strict=True))
    return top / (h0 + sum(a * h for a, h in zip(alphas, hs, strict=True)))


def fisher_negation(theta0, taus, alphas, h0, hs, delta0):
    h0 = h0 + delta0
    return theta0 - sum(a * h / (h0 + h) * t for a, h, t in zip(alphas, hs, taus, strict=True))


ELEMENTWISE = {
    "gradient_matching": eq12,
    "fisher": lambda theta0, taus, alphas, h0, hs, delta0: eq12(theta0, taus, alphas, 0.0, hs, delta0),
    "fisher_base": fisher_base,
    "removal": removal,
    "ewr": ewr,
    "fisher_negation": fisher_negation,
    "task_arithmetic": lambda theta0, taus, alphas, *_: theta0 + sum(a * t for a, t in zip(alphas, taus, strict=True)),
    "negation": lambda theta0, taus, alphas, *_: theta0 - sum(a * t for a, t in zip(alphas, taus, strict=True)),
    "averaging": lambda theta0, taus, *_: theta0 + sum(taus) / len(taus),
    "weighted": lambda theta0, taus, alphas, *_: (
        sum(a * (theta0 + t) for a, t in zip(alphas, taus, strict=True)) / sum(alphas)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("transforms", [[], [{"dare": {"density": 1.0}}]], ids=["fast", "readable"])
def test_elementwise_rules_against_scalars(method, transforms):
    base, base_curvature, models, curvatures = problem()
    alphas, delta0, base_weight = [0.5, 1.2, 0.3], 1e-3, 0.7
    needs = {"base_curvature": base_curvature, "base_weight": base_weight}
    needs = needs if "base_curvature" in RULES[method].needs else {}
    tasks = [Task(m, c, a) for m, c, a in zip(models, curvatures, alphas, strict=True)]
    found = merge(base, tasks, method=method, delta0=delta0, transforms=transforms, **needs)
    for name in SHAPES:
        rows = [base[name], base_weight * base_curvature.total(name)]
        rows += [m[name] for m in models] + [c.total(name) for c in curvatures]
        expected = []
        for theta0, h0, *rest in scalars(rows):
            thetas, hs = rest[:3], rest[3:]
            expected.append(ELEMENTWISE[method](theta0, [t - theta0 for t in thetas], alphas, h0, hs, delta0))
        wanted = torch.tensor(expected, dtype=torch.float64).reshape(base[name].shape)
        torch.testing.assert_close(found[name], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_measured_against_scalars():
    base, base_curvature, models, curvatures = problem()
    alphas = [0.5, 1.2, 0.3]
    tasks = [Task(m, c, a) for m, c, a in zip(models, curvatures, alphas, strict=True)]
    found = merge(base, tasks, method="measured", base_curvature=base_curvature, delta0=1e-3)
    for name in SHAPES:
        h0 = base_curvature.total(name) + 1e-3
        bar = h0 + sum(a * c.total(name) for a, c in zip(alphas, curvatures, strict=True))
        right = sum(
            a * (c.total(name) * (m[name] - base[name]) - c.gradient(name))
            for a, c, m in zip(alphas, curvatures, models, strict=True)
        )
        torch.testing.assert_close(found[name], base[name] + right / bar, **CLOSE)


def test_measured_warns_and_names_the_subspace_solve():
    base, base_curvature, models, curvatures = problem(1)
    with pytest.warns(UserWarning, match="subspace"):
        merge(base, [Task(models[0], curvatures[0])], method="measured", base_curvature=base_curvature)


@pytest.mark.parametrize("normalize", [False, True])
def test_matena_raffel_uses_mean_fishers(normalize):
    base, _, models, curvatures = problem()
    alphas = [0.5, 1.2, 0.3]
    tasks = [Task(m, c, a) for m, c, a in zip(models, curvatures, alphas, strict=True)]
    found = merge(base, tasks, method="matena_raffel", normalize_fishers=normalize)
    norms = [1.0] * 3
    if normalize:
        norms = [math.sqrt(sum(float((c.mean(n) ** 2).sum()) for n in SHAPES)) for c in curvatures]
    for name in SHAPES:
        weights = [a * c.mean(name) / n for a, c, n in zip(alphas, curvatures, norms, strict=True)]
        expected = sum(w * m[name] for w, m in zip(weights, models, strict=True)) / sum(weights)
        torch.testing.assert_close(found[name], expected, **CLOSE)


def test_matena_raffel_averages_where_nothing_is_known():
    base, _, models, _ = problem(2)
    flat = Curvature.from_dict({name: torch.zeros_like(value) for name, value in base.items()}, 5)
    found = merge(base, [Task(m, flat) for m in models], method="matena_raffel")
    assert same(found, {name: (models[0][name] + models[1][name]) / 2 for name in base})


def test_slerp_keeps_the_norm_of_orthogonal_vectors():
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    a, b = {"w": torch.tensor([2.0, 0.0]).double()}, {"w": torch.tensor([0.0, 2.0]).double()}
    found = merge(base, [Task(a), Task(b)], method="slerp", t=0.25)
    expected = torch.tensor([2 * math.cos(math.pi / 8), 2 * math.sin(math.pi / 8)], dtype=torch.float64)
    torch.testing.assert_close(found["w"], expected, **CLOSE)
    assert found.report.branches == {"slerp": 1}


@pytest.mark.parametrize(
    ("gram", "branch"),
    [([[1, 0.99999], [0.99999, 1]], "lerp"), ([[0, 0], [0, 1]], "lerp"), ([[1, -0.99999], [-0.99999, 1]], "lerp"), ([[1, 0.5], [0.5, 1]], "slerp")],
)  # fmt: skip
def test_slerp_branches(gram, branch):
    c0, c, found = slerp(gram, 0.3)
    assert (found, c0) == (branch, 0.0)
    if branch == "lerp":
        assert c == [0.7, 0.3]


def test_nuslerp_position_and_base():
    base, _, models, _ = problem(2)
    found = merge(base, [Task(models[0], weight=3.0), Task(models[1], weight=1.0)], method="nuslerp")
    for name, theta0 in base.items():
        a, b = (m[name] - theta0 for m in models)
        cos = float((a * b).sum() / a.norm() / b.norm())
        if abs(cos) > 0.9995:
            expected = 0.75 * a + 0.25 * b
        else:
            omega = math.acos(cos)
            expected = (math.sin(0.75 * omega) * a + math.sin(0.25 * omega) * b) / math.sin(omega)
        torch.testing.assert_close(found[name], theta0 + expected, **CLOSE)


def test_karcher_of_two_is_the_midpoint_of_the_arc():
    gram = [[4.0, 1.0], [1.0, 4.0]]
    _, c, branch = karcher(gram, [1.0, 1.0])
    _, s, _ = slerp(gram, 0.5)
    assert branch == "karcher"
    assert c == pytest.approx(s, rel=1e-9)


@pytest.mark.parametrize(
    ("gram", "alpha", "c"),
    [([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0], [0.5, 0.5]), ([[1.0, -1.0], [-1.0, 1.0]], [1.0, 1.0], [0.5, 0.5])],
)  # fmt: skip
def test_karcher_without_a_direction_is_linear(gram, alpha, c):
    assert karcher(gram, alpha) == (0.0, c, "linear")


@pytest.mark.parametrize("function", [nuslerp, karcher])
def test_weights_that_sum_to_zero_have_no_position(function):
    with pytest.raises(ValueError, match="sum"):
        function([[1.0, 0.0], [0.0, 1.0]], [1.0, -1.0])


STOCK = [
    ([[1.0, 0.5], [0.5, 1.0]], 2 * 0.5 / 1.5),
    ([[1.0, -0.5], [-0.5, 1.0]], 0.0),  # opposing task vectors keep the base
    ([[1.0, -1.0], [-1.0, 1.0]], 0.0),
    ([[0.0, 0.0], [0.0, 1.0]], 0.0),
    ([[1e-30, 0.5e-30], [0.5e-30, 1e-30]], 2 * 0.5 / 1.5),  # a product of norms under any floor
]


@pytest.mark.parametrize(("gram", "t"), STOCK)
def test_model_stock(gram, t):
    c0, c, _ = model_stock(gram)
    assert c0 == pytest.approx(1 - t)
    assert c == pytest.approx([t / 2, t / 2])


@pytest.mark.parametrize("along", ["tensor", "rows"])
def test_model_stock_beyond_the_base_where_it_is_not_clamped(along):
    """Two task vectors at a cosine of -1/2: t = 2 c / (1 + c) = -2."""
    tau = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5]])
    tasks = [Task({"w": one[None]}) for one in tau]
    for clamp, t in ((True, 0.0), (False, -2.0)):
        found = merge({"w": torch.zeros(1, 2)}, tasks, method="model_stock", along=along, clamp=clamp)
        torch.testing.assert_close(found["w"], t * tau.mean(0, keepdim=True))


def test_model_stock_end_to_end():
    base, _, models, _ = problem(3)
    found = merge(base, [Task(m) for m in models], method="model_stock")
    for name, theta0 in base.items():
        taus = [(m[name] - theta0).flatten() for m in models]
        pairs = [(0, 1), (0, 2), (1, 2)]
        c = sum(float(taus[i] @ taus[j] / taus[i].norm() / taus[j].norm()) for i, j in pairs) / 3
        t = min(1.0, max(0.0, 3 * c / (1 + 2 * c)))
        expected = t * sum(m[name] for m in models) / 3 + (1 - t) * theta0
        torch.testing.assert_close(found[name], expected, **CLOSE)


def vectors(tensor, along):
    """The vectors of a tensor, one by one: an independent reading of what rows and columns are."""
    if tensor.dim() < 2:
        return [tensor.flatten()]
    flat = tensor.flatten(1)
    return list(flat) if along == "rows" else list(flat.T)


ALONG = {
    "slerp": lambda gram: slerp(gram, 0.4),
    "nuslerp": lambda gram: nuslerp(gram, [1.0, 3.0]),
    "model_stock": model_stock,
}
CRUMBS = [{"breadcrumbs": {"density": 1.0, "gamma": 0.0}}]


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("method", ALONG)
@pytest.mark.parametrize("transforms", [[], CRUMBS], ids=["", "edited"])
def test_rules_along_rows_and_columns_are_the_rule_of_each_vector(method, along, transforms):
    shapes = {"layers.0.w": (5, 4), "layers.0.b": (6,), "conv": (3, 2, 2, 2), "scale": ()}
    base = state(0, shapes=shapes)
    base["layers.0.w"][1] = 0
    models = [tuned(base, seed) for seed in (1, 2)]
    start, one, two = (model["layers.0.w"] for model in (base, *models))
    one[2] = start[2]  # a row that was not trained
    two[3] = 2 * one[3] - start[3]  # parallel task vectors
    tasks = [Task(models[0], weight=1.0), Task(models[1], weight=3.0)]
    options = {"t": 0.4} if method == "slerp" else {}
    found = merge(base, tasks, method=method, along=along, transforms=transforms, **options)
    for name in shapes:
        one, two, start = (vectors(x[name], along) for x in (*models, base))
        for position, merged in enumerate(vectors(found[name], along)):
            x, y, origin = one[position], two[position], start[position]
            if method == "slerp":
                origin = torch.zeros_like(origin)
            a, b = x - origin, y - origin
            _, c, _ = ALONG[method]([[float(a @ a), float(a @ b)], [float(a @ b), float(b @ b)]])
            torch.testing.assert_close(merged, origin + c[0] * a + c[1] * b, rtol=1e-9, atol=1e-9)


def test_large_matrices_are_cut_between_rows():
    base = {"w": torch.zeros(300, 1000)}
    models = [{"w": torch.randn(300, 1000, generator=torch.Generator().manual_seed(s))} for s in (1, 2)]
    rows = merge(base, [Task(m) for m in models], method="model_stock", along="rows")["w"]
    for i in (0, 131, 299):
        tasks = [Task({"w": m["w"][i]}) for m in models]
        each = merge({"w": base["w"][i]}, tasks, method="model_stock")["w"]
        torch.testing.assert_close(rows[i], each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_regmean_solves_the_regression(off_diagonal):
    base = state(0, shapes={"l.weight": (3, 5), "l.bias": (3,)})
    models = [tuned(base, seed) for seed in (1, 2)]
    curvatures = [gram_curvature(m, seed, n) for m, seed, n in zip(models, (1, 2), (10, 30), strict=True)]
    tasks = [Task(m, c, w) for m, c, w in zip(models, curvatures, (0.5, 1.5), strict=True)]
    found = merge(base, tasks, method="regmean", off_diagonal=off_diagonal, ridge=0.0)
    grams = []
    for c, w, n in zip(curvatures, (0.5, 1.5), (10, 30), strict=True):
        g = c.factor_a("l.weight") * n * w
        grams.append(torch.where(torch.eye(5, dtype=torch.bool), g, g * off_diagonal))
    right = sum(g @ m["l.weight"].T for g, m in zip(grams, models, strict=True))
    expected = torch.linalg.solve(sum(grams), right).T
    torch.testing.assert_close(found["l.weight"], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        found["l.bias"], 0.25 * models[0]["l.bias"] + 0.75 * models[1]["l.bias"], **CLOSE
    )


def test_regmean_adds_the_moments_of_several_products():
    """The posterior of a merge holds one product a task, side by side."""
    base = {"w": torch.zeros(3, 5, dtype=torch.float64)}
    grams = torch.stack([torch.eye(5).double() * k for k in (1, 2, 4)])
    stacked, plain = (
        Curvature.from_dict({"w": torch.ones(3, 5)}, 10, factor_a={"w": a}) for a in (grams[:2], grams[2])
    )
    models = [{"w": torch.full((3, 5), k, dtype=torch.float64)} for k in (1.0, 8.0)]
    found = merge(base, [Task(models[0], stacked), Task(models[1], plain)], method="regmean")["w"]
    torch.testing.assert_close(found, torch.full((3, 5), (3 * 1 + 4 * 8) / 7, dtype=torch.float64))


def test_regmean_ridge_averages_inputs_that_never_occur():
    base = state(0, shapes={"l.weight": (3, 5)})
    models = [tuned(base, seed) for seed in (1, 2)]
    curvatures = [gram_curvature(m, 1, 10) for m in models]
    for c in curvatures:
        c.factor_a("l.weight")[4] = 0
        c.factor_a("l.weight")[:, 4] = 0
    tasks = [Task(m, c) for m, c in zip(models, curvatures, strict=True)]
    found = merge(base, tasks, method="regmean")["l.weight"]
    mean = (models[0]["l.weight"] + models[1]["l.weight"]) / 2
    torch.testing.assert_close(found[:, 4], mean[:, 4], rtol=1e-6, atol=1e-6)


def test_greedy_soup_takes_only_what_helps():
    base = {"w": torch.zeros(3, dtype=torch.float64)}
    models = [{"w": torch.full((3,), value, dtype=torch.float64)} for value in (1.0, 1.2, 5.0)]
    target = torch.full((3,), 1.1, dtype=torch.float64)
    tasks = [Task(m, name=name) for m, name in zip(models, "abc", strict=True)]
    found = merge(base, tasks, method="greedy_soup", score=lambda state: -float((state["w"] - target).norm()))
    torch.testing.assert_close(found["w"], target, **CLOSE)
    told, members = found.report.notes[0].split(":")[0].split(" of ")
    assert told == "greedy soup"
    assert "c" not in members.replace(",", " ").split()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "needs score"),
        ({"score": 3}, TypeError, "must be a function"),
        ({"score": lambda s: float("nan")}, ValueError, "is NaN"),
        ({"score": lambda s: 0.0, "tasks": []}, ValueError, "no tasks"),
    ],
)
def test_greedy_soup_errors(options, error, text):
    with pytest.raises(error, match=text):
        merge(state(0), **{"tasks": [Task(state(1))], "method": "greedy_soup", **options})


def test_greedy_soup_finds_an_existing_output_before_it_scores(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="pass overwrite"):
        merge(state(0), [Task(state(1))], method="greedy_soup", score=pytest.fail, out=tmp_path)
    with pytest.raises(ValueError, match="delta0 is -1"):
        merge(state(0), [Task(state(1))], method="greedy_soup", score=lambda _: 0.0, delta0=-1)


def test_curvature_of_a_linear_regression_gives_its_joint_solution():
    base, base_curvature, _, _ = problem(1)
    alphas, h0 = [0.4, 1.7], base_curvature.total("layers.0.w")
    minima = [state(seed)["layers.0.w"] for seed in (5, 6)]
    hs = [curvature(base, seed, 7).total("layers.0.w") for seed in (5, 6)]
    theta0, terms = base["layers.0.w"], list(zip(alphas, hs, minima, strict=True))
    h_bar = h0 + sum(a * h for a, h, _ in terms)
    joint = (h0 * theta0 + sum(a * h * m for a, h, m in terms)) / h_bar
    tuned = [{"w": (h0 * theta0 + h * m) / (h0 + h)} for _, h, m in terms]  # Eq. 8 for quadratic losses
    known = [Curvature.from_dict({"w": h}, 1) for h in hs]
    tasks = [Task(*given) for given in zip(tuned, known, alphas, strict=True)]
    found = merge({"w": theta0}, tasks, base_curvature=Curvature.from_dict({"w": h0}, 1), delta0=0.0)
    torch.testing.assert_close(found["w"], joint, **CLOSE)


@pytest.mark.parametrize(
    ("shape", "name", "transposed"),
    [
        ((5, 3), "h.0.c_fc.weight", True),
        ((4, 4), "h.0.attn.c_proj.weight", True),
        ((3, 2, 2, 2), "conv.weight", False),
    ],
)
def test_regmean_of_conv1d_and_convolutions(tmp_path, shape, name, transposed):
    import json

    from safetensors.torch import save_file

    base = state(0, shapes={name: shape})
    models = [tuned(base, seed) for seed in (1, 2)]
    curvatures = [gram_curvature(m, seed, 10, (name,) if transposed else ()) for seed, m in enumerate(models)]
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tasks = [Task(m, c) for m, c in zip(models, curvatures, strict=True)]
    found = merge(tmp_path / "base", tasks, method="regmean", off_diagonal=1.0, ridge=0.0)[name]
    flat = [m[name].T if transposed else m[name].flatten(1) for m in models]
    grams = [c.factor_a(name) for c in curvatures]
    right = sum(g @ w.T for g, w in zip(grams, flat, strict=True))
    expected = torch.linalg.solve(sum(grams), right)
    expected = (expected if transposed else expected.T).reshape(shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_regmean_of_a_singular_system_names_the_ridge():
    base = state(0, shapes={"l.weight": (3, 5)})
    zero = {"l.weight": torch.zeros(5, 5, dtype=torch.float64)}
    flat = Curvature.from_dict({"l.weight": torch.ones(3, 5)}, 4, factor_a=zero)
    models = [tuned(base, 1), tuned(base, 2)]
    with pytest.raises(ValueError, match=r"'l.weight': .* is singular .* ridge=1e-6"):
        merge(base, [Task(m, flat) for m in models], method="regmean", ridge=0.0)
    found = merge(base, [Task(m, flat) for m in models], method="regmean")["l.weight"]
    torch.testing.assert_close(found, (models[0]["l.weight"] + models[1]["l.weight"]) / 2)


def test_regmean_of_square_matrices_needs_to_know_how_they_are_stored():
    generator = torch.Generator().manual_seed(4)
    name = "h.0.attn.c_proj.weight"
    xs = [torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    weights = [torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2)]  # [in, out]
    grams = [x.T @ x for x in xs]
    truth = torch.linalg.solve(sum(grams), sum(g @ w for g, w in zip(grams, weights, strict=True)))

    def known(x):
        curvature = gram_curvature({name: weights[0]}, 0, 12)
        curvature.factor_a(name).copy_(x.T @ x / 12)
        return curvature

    def merged(stored, **options):
        tasks = [Task({name: w}, known(x)) for w, x in zip(stored, xs, strict=True)]
        return merge(
            {name: torch.zeros(5, 5, dtype=torch.float64)},
            tasks,
            method="regmean",
            off_diagonal=1.0,
            ridge=0.0,
            **options,
        )[name]

    with pytest.raises(
        ValueError, match=r"'h.0.attn.c_proj.weight' \[5, 5\] is stored \[in, out\] in GPT-2's Conv1D"
    ):
        merged(weights)
    torch.testing.assert_close(merged(weights, conv1d=True), truth)
    torch.testing.assert_close(merged([w.T.contiguous() for w in weights], conv1d=False), truth.T)


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.4])
def test_a_weight_of_its_own_inside_hbar_makes_the_merge_linear_in_alpha(weight):
    base, base_curvature, models, curvatures = problem()
    alphas = [0.5, 1.2, 0.3]
    tasks = [Task(m, c, a) for m, c, a in zip(models, curvatures, alphas, strict=True)]
    found = merge(base, tasks, base_curvature=base_curvature, delta0=1e-3, hbar_weight=weight)
    for name in SHAPES:
        h0, *hs = (c.total(name) for c in (base_curvature, *curvatures))
        bar = h0 + 1e-3 + weight * sum(hs)
        terms = [(h0 + 1e-3 + h) * (m[name] - base[name]) / bar for h, m in zip(hs, models, strict=True)]
        expected = base[name] + sum(a * term for a, term in zip(alphas, terms, strict=True))
        torch.testing.assert_close(found[name], expected, **CLOSE)


@pytest.mark.parametrize(("value", "error"), [("one", TypeError), (-1.0, ValueError), (math.nan, ValueError)])
def test_hbar_weight_is_a_number_of_at_least_0(value, error):
    base, base_curvature, models, curvatures = problem(1)
    with pytest.raises(error, match="gradient_matching: hbar_weight is"):
        merge(
            base,
            [Task(models[0], curvatures[0])],
            base_curvature=base_curvature,
            hbar_weight=value,
        )


SPECTRAL = ["tsv_m", "iso_c", "iso_cts"]
MATRICES = {"layers.0.w": (7, 9), "layers.1.w": (9, 6), "conv": (6, 2, 2, 2), "norm": (5,), "scale": ()}


def matrices(count, rank=None):
    """A base and fine-tunes of it in float64, of full rank or of a low one."""
    base = state(0, shapes=MATRICES)
    models = [tuned(base, seed) for seed in range(1, count + 1)]
    for model in models if rank else ():
        for name in ("layers.0.w", "layers.1.w"):
            u, s, vt = torch.linalg.svd(model[name] - base[name], full_matrices=False)
            model[name] = base[name] + (u[:, :rank] * s[:rank]) @ vt[:rank]
    return base, models


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("method", SPECTRAL)
def test_spectral_rules_are_the_published_ones(method, count, scale):
    base, models = matrices(count)
    found = merge(base, [Task(m) for m in models], method=method, scale=scale)
    for name in base:
        expected = getattr(oracle, method)(base[name], [m[name] - base[name] for m in models], scale)
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10)
    report = found.report
    assert report.tensors == {"whole": 3, "linear": 2}
    assert report.formula.endswith("; of 2 tensors: theta0 + scale * mean_t alpha_t tau_t")


@pytest.mark.parametrize("method", SPECTRAL)
def test_directions_of_zero_singular_values_take_no_part(method):
    base, models = matrices(2, rank=2)
    models.append({name: value.clone() for name, value in base.items()})  # trained nothing
    found = merge(base, [Task(m) for m in models], method=method)
    for name in ("layers.0.w", "layers.1.w"):
        update = found[name] - base[name]
        spanned = torch.cat([m[name] - base[name] for m in models], 1)
        outside = update - spanned @ torch.linalg.pinv(spanned) @ update
        assert float(outside.norm()) < 1e-10 * float(update.norm())
        assert int(torch.linalg.matrix_rank(update)) == 4


@pytest.mark.parametrize("method", SPECTRAL)
def test_weights_multiply_the_task_vectors_of_spectral_rules(method):
    base, models = matrices(3)
    weights = [0.5, 1.5, 0.0]
    found = merge(base, [Task(m, weight=w) for m, w in zip(models, weights, strict=True)], method=method)
    scaled = [
        {name: base[name] + w * (m[name] - base[name]) for name in base}
        for m, w in zip(models, weights, strict=True)
        if w  # one of weight 0 is no task
    ]
    expected = merge(base, [Task(m) for m in scaled], method=method)
    assert same(found, expected)


@pytest.mark.parametrize("select_topk", [1.0, 0.4, 0.0])
def test_sce(select_topk):
    base, models = matrices(3)
    found = merge(base, [Task(m) for m in models], method="sce", select_topk=select_topk)
    for name in base:
        expected = oracle.sce(base[name], [m[name] - base[name] for m in models], select_topk)
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10)


def test_sce_of_tiny_task_vectors_weighs_them_alike():
    base = {"w": torch.zeros(3, dtype=torch.float64)}
    models = [
        {"w": torch.tensor(values, dtype=torch.float64)}
        for values in ([1e-4, 1e-4, -1e-4], [3e-4, -1e-5, -3e-4])
    ]
    found = merge(base, [Task(m) for m in models], method="sce")["w"]
    torch.testing.assert_close(found, torch.tensor([2e-4, 1e-4, -2e-4], dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("origin", ["base", "zero"])
def test_multislerp(origin):
    base, models = matrices(3)
    weights = [0.5, 1.2, 0.3]
    tasks = [Task(m, weight=w) for m, w in zip(models, weights, strict=True)]
    found = merge(base, tasks, method="multislerp", origin=origin, eps=0.0)
    for name, start in base.items():
        start = start if origin == "base" else torch.zeros_like(start)
        expected = start + oracle.multislerp([m[name] - start for m in models], weights)
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10)


def test_multislerp_of_directions_that_cancel():
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    east, west, none = (
        {"w": torch.tensor(v, dtype=torch.float64)} for v in ([1.0, 0.0], [-1.0, 0.0], [0.0, 0.0])
    )
    assert not merge(base, [Task(east), Task(west)], method="multislerp")["w"].any()
    assert not merge(base, [Task(none)] * 3, method="multislerp")["w"].any()
    with pytest.raises(ValueError, match=r"'w': the weighted directions of the models cancel"):
        merge(base, [Task(east), Task(west), Task(none)], method="multislerp")


@pytest.mark.parametrize("t", [0.0, 0.05, 10.0])
def test_nearswap(t):
    base, (model,) = matrices(1)
    found = merge(base, [Task(model)], method="nearswap", t=t)
    for name in base:
        torch.testing.assert_close(found[name], oracle.nearswap(base[name], model[name], t), **CLOSE)


def test_arcee_fusion():
    base, (model,) = matrices(1)
    found = merge(base, [Task(model)], method="arcee_fusion")
    for name in base:
        torch.testing.assert_close(found[name], oracle.arcee_fusion(base[name], model[name]), **CLOSE)
        assert name == "scale" or 0 < int((found[name] != base[name]).sum()) < base[name].numel()


def test_formulas_are_texts_that_follow_the_options():
    assert all(
        isinstance(rule.formula, str) and rule.formula == rule.told(rule.options) for rule in RULES.values()
    )
    rule = replace(RULES["weighted"], lacks={})
    assert rule.formula == "sum_t alpha_t theta_t / sum_t alpha_t"
    assert rule.told(rule.options.changed("weighted", {"normalize": False})) == "sum_t alpha_t theta_t"
    assert "sum_t 0.5 H_t" in RULES["gradient_matching"].told({"hbar_weight": 0.5})
