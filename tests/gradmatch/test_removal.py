"""The path, the budget and the report of a removal, against loops in float64 and on losses that are truly quadratic."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradmatch import Task, subtract
from gradmatch.estimators import Curvature
from gradmatch.measure.objective import Objective
from gradmatch.removal import (
    AlphaPath,
    Problem,
    alpha_path,
    budget,
    choose,
    compared,
    comparison_table,
    continuations_needed,
    path_table,
    removal_report,
    report_table,
)  # fmt: skip
from gradmatch.removal.forecast import taylor

ALPHAS = (0.0, 0.3, 1.0, 1.7)
METHODS = ("removal", "negation", "ewr", "fisher_negation")
N0, NT, DELTA0, KEEP, BASE_WEIGHT = 40, 10, 0.05, 0.1, 0.8


def random_problem(**options):
    """Two tensors with random weights and curvatures (gradient of the task's loss measured), and no data."""
    generator = torch.Generator().manual_seed(3)

    def draw(positive=False):
        shapes = {"layers.0.w": (3, 4), "layers.1.w": (5,)}
        values = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        return {n: v.square() if positive else v for n, v in values.items()}

    base, model, f0, f, gradient = draw(), draw(), draw(True), draw(True), draw()
    task = Task(model, Curvature.from_dict(f, NT, gradient=gradient), name="toxic")
    settings = {"base_weight": BASE_WEIGHT, "delta0": DELTA0, "keep": KEEP} | options
    return Problem(base, task, Curvature.from_dict(f0, N0), **settings), (base, model, f0, f, gradient)


def moved(method, theta0, tau, h0, h, alpha, guard):
    """The displacement of one weight, from the formulas, and whether the guard decides it."""
    if method == "negation":
        return -alpha * tau, False
    if method == "ewr":
        return (h0 * theta0 - alpha * h * tau) / (h0 + alpha * h) - theta0, False
    if method == "fisher_negation":
        return -alpha * h / (h0 + h) * tau, False
    guarded = h0 - alpha * h < KEEP * h0
    if guard == "floor":
        return -alpha * (h0 + h) * tau / max(h0 - alpha * h, KEEP * h0), guarded
    h = (1 - KEEP) * h0 / alpha if guarded else h
    return -alpha * (h0 + h) * tau / (h0 - alpha * h), guarded


@pytest.mark.parametrize("guard", ["floor", "scale"])
@pytest.mark.parametrize("method", METHODS)
def test_path_without_data_is_the_diagonal_forecast(method, guard):
    problem, (base, model, f0, f, gradient) = random_problem(method=method, guard=guard)
    for point in alpha_path(problem, ALPHAS):
        forgetting = collateral = 0.0
        clamped = count = 0
        for name in base:
            for t0, t, a, b, g in zip(
                *(x[name].flatten().tolist() for x in (base, model, f0, f, gradient)), strict=True
            ):
                tau = t - t0
                d, guarded = moved(method, t0, tau, BASE_WEIGHT * N0 * a + DELTA0, NT * b, point.alpha, guard)
                collateral += 0.5 * a * d * d
                forgetting += g / NT * d + 0.5 * b * ((d - tau) ** 2 - tau**2)
                clamped += guarded
                count += 1
        assert point.collateral == pytest.approx(collateral, rel=1e-9, abs=1e-12)
        assert point.forgetting == pytest.approx(forgetting, rel=1e-9, abs=1e-12)
        assert point.clamped == clamped / count
        assert (point.forgetting_by, point.collateral_by) == ("diagonal", "diagonal")
        assert point.measured_collateral is None


def test_a_scaling_guard_bounds_the_step_however_flat_the_base_is():
    base, model = {"w": torch.zeros(3, dtype=torch.float64)}, {"w": torch.ones(3, dtype=torch.float64)}
    task = Task(model, Curvature.from_dict({"w": torch.tensor([0.0, 1.0, 1e9])}, 1))
    flat = Curvature.from_dict({"w": torch.tensor([1e-9, 1e-9, 1e-9])}, 1)
    options = {"weight": 0.5, "keep": 0.1, "delta0": 0.0, "guard": "scale"}
    with pytest.warns(UserWarning, match="clamped"):
        moved = subtract(base, task, base_curvature=flat, **options)["w"]
    most = 0.5 * (1 + 0.9 / 0.5) / 0.1
    torch.testing.assert_close(moved, -torch.tensor([0.5, most, most], dtype=torch.float64))


@pytest.mark.parametrize("transforms", [(), ({"dare": {"density": 1.0}},)], ids=["kernel", "readable"])
@pytest.mark.parametrize("guard", ["floor", "scale"])
def test_two_tasks_share_the_guard(guard, transforms):
    generator = torch.Generator().manual_seed(2)
    h0, h1, h2, t1, t2, theta0 = torch.rand(6, 50, generator=generator, dtype=torch.float64)
    tasks = [
        Task({"w": theta0 + t}, Curvature.from_dict({"w": h}, 1), w)
        for t, h, w in ((t1, h1, 0.4), (t2, h2, 0.9))
    ]
    with pytest.warns(UserWarning, match="clamped"):
        found = subtract(
            {"w": theta0}, tasks, base_curvature=Curvature.from_dict({"w": h0}, 1), keep=KEEP, delta0=0.0, guard=guard, transforms=transforms,
        )["w"]  # fmt: skip
    for i in range(50):
        removed = 0.4 * h1[i] + 0.9 * h2[i]
        if guard == "floor":
            pull = 0.4 * (h0[i] + h1[i]) * t1[i] + 0.9 * (h0[i] + h2[i]) * t2[i]
            left = max(h0[i] - removed, KEEP * h0[i])
            assert found[i] == pytest.approx(float(theta0[i] - pull / left), rel=1e-9)
            continue
        c = min(1.0, (1 - KEEP) * h0[i] / removed)
        pull = 0.4 * (h0[i] + c * h1[i]) * t1[i] + 0.9 * (h0[i] + c * h2[i]) * t2[i]
        assert found[i] == pytest.approx(float(theta0[i] - pull / (h0[i] - c * removed)), rel=1e-9)


@pytest.mark.parametrize("guard", ["floor", "scale"])
@pytest.mark.parametrize("method", METHODS)
def test_path_moves_as_subtract_does(method, guard):
    problem, (base, *_) = random_problem(method=method, guard=guard)
    shared = {"base_curvature": problem.base_curvature, "base_weight": BASE_WEIGHT, "delta0": DELTA0}
    with pytest.warns(UserWarning, match="clamped") if method == "removal" else nullcontext():
        result = subtract(base, problem.task, weight=0.7, keep=KEEP, guard=guard, method=method, **shared)
    made = problem.at(0.7)
    assert set(made) == set(base)
    for name in base:
        torch.testing.assert_close(made[name], result[name], rtol=0, atol=0)
    assert made.report.clamped_share == result.report.clamped_share


def test_half_precision_is_not_rounded_to_on_the_path():
    problem, (base, model, *_) = random_problem()
    half = {n: v.bfloat16() for n, v in base.items()}
    task = Task({n: v.bfloat16() for n, v in model.items()}, problem.task.curvature)
    made = replace(problem, base=half, task=task).at(0.01)
    assert {value.dtype for value in made.values()} == {torch.float32}
    assert any(bool((made[n].bfloat16().float() != made[n]).any()) for n in made)


@pytest.fixture
def regression():
    """Linear regression, whose losses are quadratic: base fitted to what stays, task fine-tuned by a step of descent."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x0, y0, x, y = draw(30, 4), draw(30, 1), draw(12, 4), draw(12, 1)
    theta0 = torch.linalg.lstsq(x0, y0).solution.T
    theta = theta0 - 0.02 * ((x @ theta0.T - y).T @ x)
    module = nn.Linear(4, 1, bias=False).double()
    retain = Objective(module, [(x0[:20], y0[:20]), (x0[20:], y0[20:])], likelihood="regression")
    remove = Objective(module, [(x, y)], likelihood="regression")
    curvature = Curvature.from_dict({"weight": x.square().mean(0)[None]}, len(x))
    base_curvature = Curvature.from_dict({"weight": x0.square().mean(0)[None]}, len(x0))
    task = Task({"weight": theta}, curvature)
    return Problem({"weight": theta0}, task, base_curvature, retain=retain, remove=remove), (x0, y0)


@pytest.mark.parametrize("method", METHODS)
def test_with_data_a_quadratic_loss_rises_as_forecast(regression, method):
    problem, _ = regression
    problem = replace(problem, method=method)
    for point in alpha_path(problem, ALPHAS):
        assert point.collateral == pytest.approx(point.measured_collateral, rel=1e-8, abs=1e-10)
        assert point.forgetting == pytest.approx(point.measured_forgetting, rel=1e-8, abs=1e-10)
        assert (point.forgetting_by, point.collateral_by) == ("ggn", "ggn")


def counting(monkeypatch, name):
    """The objectives that a method of theirs is called on, in order."""
    asked, exact = [], getattr(Objective, name)
    monkeypatch.setattr(Objective, name, lambda self, *given: asked.append(self) or exact(self, *given))
    return asked


def test_a_point_takes_one_derivative_and_one_pass_of_each_data_set(regression, monkeypatch):
    problem, _ = regression
    path = AlphaPath(problem)
    path.point(0.3)  # and what the data says about the start
    derivatives, passes = counting(monkeypatch, "expand"), counting(monkeypatch, "loss")
    path.point(0.5)
    assert derivatives == passes == [problem.retain, problem.remove]


def test_a_budget_asks_no_derivative_where_the_measured_rise_settles_it(regression, monkeypatch):
    problem, _ = regression
    path = AlphaPath(problem)
    alpha_path(path, [1.0])
    derivatives, passes = counting(monkeypatch, "expand"), counting(monkeypatch, "loss")
    monkeypatch.setattr(problem.retain, "loss", lambda weights: passes.append(None) or math.inf)
    found = budget(path, 1e-3, share=0.99, largest=0.5, steps=1)
    assert (found.alpha, found.bound, derivatives) == (0.0, "measured collateral", [])
    assert passes
    assert {point.forgetting for point in found.path} == {None}
    assert "-" in path_table(found.path).splitlines()[1]


@pytest.mark.parametrize("method", METHODS)
def test_alpha_multiplies_the_weight_of_the_task(method):
    problem, _ = random_problem(method=method)
    halved = replace(problem, task=replace(problem.task, weight=0.5))
    one, other = problem.at(0.4), halved.at(0.8)
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    assert one.report.clamped_share == other.report.clamped_share
    assert halved.largest_alpha(0.2) == pytest.approx(2 * problem.largest_alpha(0.2), rel=0.01)


@pytest.mark.parametrize("guard", ["floor", "scale"])
def test_a_negative_curvature_of_the_task_is_never_guarded(guard):
    problem, (base, model, _, f, _) = random_problem(guard=guard)
    hessian = {name: torch.where(value > value.median(), value, -value) for name, value in f.items()}
    problem = replace(problem, task=Task(model, Curvature.from_dict(hessian, NT)))
    shared = {"base_curvature": problem.base_curvature, "base_weight": BASE_WEIGHT, "delta0": DELTA0}
    with pytest.warns(UserWarning, match="clamped"):
        result = subtract(base, problem.task, weight=0.7, keep=KEEP, guard=guard, **shared)
    made = problem.at(0.7)
    for piece in problem.pieces():
        torch.testing.assert_close(made[piece.name], result[piece.name])
        h = NT * piece.mean
        negative = h < 0
        assert negative.any()
        free = piece.theta0 - 0.7 * (piece.h0 + h) * piece.tau / (piece.h0 - 0.7 * h)
        torch.testing.assert_close(made[piece.name][negative], free[negative])
    assert result.report.largest_alpha[0.1] > 0


def test_a_negative_curvature_of_the_base_is_refused():
    problem, (base, _, f0, *_) = random_problem()
    hessian = Curvature.from_dict({name: -value for name, value in f0.items()}, N0)
    with pytest.raises(ValueError, match="the base's curvature H0 is not positive"):
        subtract(base, problem.task, base_curvature=hessian)
    with pytest.raises(ValueError, match="the base's curvature H0 is not positive"):
        alpha_path(replace(problem, base_curvature=hessian), [0.5])
    with pytest.raises(ValueError, match=r"no curvature in the base and delta0 = 0, so Eq\. 13"):
        subtract(base, problem.task, base_curvature=0.0, delta0=0.0)


def test_an_isotropic_base_and_flat_tensors_go_along_as_in_subtract():
    problem, (base, model, _, f, _) = random_problem()
    part = Task(model, Curvature.from_dict({"layers.0.w": f["layers.0.w"]}, NT), name="part")
    problem = replace(problem, task=part, base_curvature=2.0, missing_curvature="zero")
    shared = {"base_curvature": 2.0, "base_weight": BASE_WEIGHT, "delta0": DELTA0}
    with pytest.warns(UserWarning, match="clamped"):
        result = subtract(base, part, weight=0.7, keep=KEEP, missing_curvature="zero", **shared)
    made = problem.at(0.7)
    for name in base:
        torch.testing.assert_close(made[name], result[name])
    with pytest.raises(ValueError, match="missing_curvature='zero'"):
        alpha_path(replace(problem, missing_curvature="error"), [0.5])


def test_what_is_subtracted_may_be_a_bare_model_or_a_list():
    problem, (base, model, *_) = random_problem()
    bare = subtract(base, model, method="negation", weight=0.5)
    listed = subtract(base, iter([Task(model, weight=torch.tensor(0.5))]), method="negation")
    for name, value in base.items():
        torch.testing.assert_close(bare[name], value - 0.5 * (model[name] - value))
        torch.testing.assert_close(listed[name], bare[name])
    with pytest.raises(ValueError, match=r"needs a curvature.*such as negation"):
        subtract(base, model, base_curvature=problem.base_curvature)
    for odd in (3, [model], [problem.task, "toxic"]):
        with pytest.raises(TypeError, match=r"what is removed is a Task\(model, curvature\)"):
            subtract(base, odd, base_curvature=problem.base_curvature)
    for weight in ("0.5", [0.5], None, True):
        with pytest.raises(TypeError, match=r"weight is .* must be a number"):
            subtract(base, model, method="negation", weight=weight)
    with pytest.raises(TypeError, match=r"a budget is of a Task\(model, curvature\)"):
        replace(problem, task=[problem.task, "toxic"])


def test_data_on_another_module_is_refused(regression):
    problem, _ = regression
    other, batch = nn.Sequential(nn.Linear(4, 1, bias=False)).double(), (torch.zeros(2, 4), torch.zeros(2, 1))
    retain = Objective(other, [tuple(part.double() for part in batch)], likelihood="regression")
    said = "the data to retain runs through a Sequential without a parameter 'weight'"
    with pytest.raises(ValueError, match=said):
        AlphaPath(replace(problem, retain=retain))


def test_measured_rise_is_the_loss(regression):
    problem, (x0, y0) = regression
    (piece,) = problem.pieces()
    theta = problem.at(0.5)["weight"]

    def loss(weights):
        return float(0.5 * (x0 @ weights.T - y0).square().sum()) / len(x0)

    (point,) = alpha_path(problem, [0.5])
    assert point.measured_collateral == pytest.approx(loss(theta) - loss(piece.theta0))


@pytest.mark.parametrize("with_data", [False, True])
def test_budget_is_kept_and_used(regression, with_data):
    problem, _ = regression
    if not with_data:
        problem = replace(problem, retain=None, remove=None)
    nats = alpha_path(problem, [0.6])[0].collateral
    found = budget(problem, nats, share=0.99, largest=1.0, steps=5)
    assert found.bound == ("measured collateral" if with_data else "collateral")
    assert 0.6 - 0.2 / 16 <= found.alpha <= 0.6 + 1e-9
    at = {point.alpha: point for point in found.path}
    assert at[found.alpha].collateral <= nats
    assert list(at) == sorted(at)


def test_what_stands_beside_binds_too_and_the_nearest_budget_is_told(regression):
    """A second set that must stay: its own limit; a budget that nothing meets names the least that something would."""
    problem, (x0, y0) = regression
    other = Objective(problem.retain.module, [(3 * x0, 3 * y0)], likelihood="regression")
    problem = replace(problem, beside={"other": other}, method="negation")
    path = AlphaPath(problem)
    free = budget(path, {"retain": 1e3, "other": 1e3}, share=0.99, largest=1.0, steps=5)
    assert (free.alpha, free.bound) == (1.0, "largest")
    limit = alpha_path(path, [0.4])[0].beside["other"]
    bound = budget(path, {"retain": 1e3, "other": limit}, share=0.99, largest=1.0, steps=5)
    assert bound.bound == "measured rise on other"
    assert 0.4 - 0.2 / 16 <= bound.alpha <= 0.4 + 1e-9
    nothing = budget(path, 1e-15, share=0.99, largest=1.0, steps=1)
    assert nothing.alpha == 0
    alpha, nats = nothing.nearest
    assert alpha == min(point.alpha for point in nothing.path)
    assert budget(path, 1.01 * nats, share=0.99, largest=alpha, steps=1).alpha == alpha
    assert free.nearest is None


def test_a_guarded_budget_chooses_the_damping_that_forgets_most_and_is_compared(regression):
    problem, _ = regression
    bare = replace(problem, task=replace(problem.task, curvature=None), method="guarded")
    chosen = choose(bare, 0.05, dampings=(0.01, 10.0), largest=8.0)
    assert set(chosen.tried) == {0.01, 10.0}
    rises = {damping: rise for damping, (_, rise) in chosen.tried.items()}
    assert chosen.damping == max(rises, key=rises.get)
    weight = {"weight": chosen.budget.alpha, "damping": chosen.damping}
    made = subtract(bare.base, bare.task, method="guarded", base_curvature=bare.base_curvature, **weight)
    torch.testing.assert_close(chosen.problem.at(chosen.budget.alpha)["weight"], made["weight"])
    after = problem.retain.loss(made) / problem.retain.num_examples
    assert chosen.after["retain"].mean == pytest.approx(after)
    assert chosen.after["retain"].mean - chosen.before["retain"].mean <= 0.05
    slope = problem.remove.gradient(problem.base)
    gradient = Curvature.from_dict({"weight": torch.zeros(1, 4)}, 1, gradient=slope)
    found = compared(problem, 0.05, gradient=gradient, dampings=(0.1,), share=0.99)
    assert [one.problem.method for one in found] == [
        "negation", "guarded", "ascent", "removal", "ewr", "fisher_negation",
    ]  # fmt: skip
    assert all(one.after["retain"].mean - one.before["retain"].mean <= 0.05 for one in found)
    ascent = found[2]
    assert ascent.after["remove"].mean > ascent.before["remove"].mean
    table = comparison_table(found).splitlines()
    assert [line.split()[0] for line in table[1:-1]] == [one.problem.method for one in found]


def test_how_many_continuations_a_comparison_takes():
    """2 ((1.959964 + .841621) .2 / .03)^2 = 697.7"""
    assert continuations_needed(0.2, 0.03) == 698
    assert continuations_needed(0.2, 0.06) == 175


def test_budget_takes_over_the_points_of_a_path(regression, monkeypatch):
    problem, _ = regression
    path = AlphaPath(problem)
    known = alpha_path(path, [0.25, 0.5, 0.75, 1.0])
    nats = max(point.measured_collateral for point in known) + 1
    for name in ("expand", "loss"):
        monkeypatch.setattr(Objective, name, lambda *_: pytest.fail("computed again"))
    found = budget(path, nats, share=0.99, largest=1.0, steps=4)
    assert (found.alpha, found.path) == (1.0, tuple(known))


def test_budget_listens_to_what_is_measured(regression, monkeypatch):
    problem, _ = regression
    nats = alpha_path(problem, [0.6])[0].collateral
    monkeypatch.setattr(problem.retain, "loss", lambda weights: 10 * Objective.loss(problem.retain, weights))
    found = budget(problem, nats, share=0.99, largest=1.0, steps=5)
    assert found.bound == "measured collateral"
    assert 0 < found.alpha < 0.59


def test_budget_stops_at_the_guard_and_at_the_largest():
    problem, _ = random_problem()
    limit = problem.largest_alpha(0.2)
    found = budget(problem, 1e9, share=0.2)
    assert (found.alpha, found.bound) == (pytest.approx(limit), "clamped share")
    assert found.path[-1].clamped <= 0.2
    assert budget(problem, 1e9, share=0.2, largest=limit / 2).bound == "largest"


def test_a_budget_that_nothing_fits_is_alpha_zero():
    problem, _ = random_problem(method="negation")
    assert budget(problem, 1e-12).alpha == 0.0


def test_a_rise_that_is_no_number_exceeds_every_budget(regression, monkeypatch):
    problem, _ = regression
    monkeypatch.setattr(problem.retain, "loss", lambda weights: math.nan)
    assert budget(problem, 1e9, share=0.99).alpha == 0.0


def test_report_adds_up():
    problem, _ = random_problem()
    report = removal_report(problem, 0.7)
    assert json.loads(json.dumps(report)) == report
    squares = {}
    for piece in problem.pieces():
        d = problem.at(0.7)[piece.name] - piece.theta0
        squares[piece.name.removesuffix(".w")] = float((piece.h0 * d * d).sum()), float((d * d).sum())
    for line in report["layers"]:
        assert line["h0_norm"] == pytest.approx(math.sqrt(squares[line["layer"]][0]))
        assert line["norm"] == pytest.approx(math.sqrt(squares[line["layer"]][1]))
    assert sum(line["h0_share"] for line in report["layers"]) == pytest.approx(1.0)
    assert report["layers"][0]["h0_share"] >= report["layers"][1]["h0_share"]
    assert report["total"]["clamped"] == alpha_path(problem, [0.7])[0].clamped
    assert "layers.0" in report_table(report)
    assert "1 more layer" in report_table(report, rows=1)


def test_report_of_what_was_written():
    problem, (base, *_) = random_problem()
    assert removal_report(problem, 0.7, result=base)["total"]["norm"] == 0.0


def test_table_names_what_was_used(regression):
    problem, _ = regression
    table = path_table(alpha_path(problem, [0.5]))
    assert "ggn" in table
    assert "[" in table.splitlines()[1]
    assert "diagonal" in path_table(alpha_path(random_problem()[0], [0.5]))


def test_taylor_counts_slope_and_curvature():
    d, h, g = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), torch.tensor([0.1, 0.2])
    assert taylor(d, h, g) == pytest.approx(0.1 - 0.4 + 0.5 * (3 + 2))
    assert taylor(d, h, None) == pytest.approx(2.5)


def with_tokenizer(folder, words):
    folder.mkdir()
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return folder


def test_tokenizers_are_compared(tmp_path):
    base, same = with_tokenizer(tmp_path / "base", "ab"), with_tokenizer(tmp_path / "same", "ab")
    other = with_tokenizer(tmp_path / "other", "abc")
    curvature = Curvature.from_dict({"w": torch.ones(1)}, 1)
    Problem(base, Task(same, curvature), curvature)
    with pytest.raises(ValueError, match=r"\(2 tokens\).*\(3 tokens\) differ"):
        Problem(base, Task(other, curvature), curvature)
    with pytest.raises(ValueError, match="was not fine-tuned from this base"):
        subtract(base, Task(other, curvature), base_curvature=curvature)


def test_bad_problems():
    problem, _ = random_problem()
    wide = {**problem.task.model, "layers.1.w": torch.zeros(6)}
    only = Curvature.from_dict({"layers.0.w": torch.ones(3, 4)}, 1)
    for change, text in (
        ({"method": "remval"}, "did you mean 'removal'"),
        ({"guard": "ceil"}, "guard is 'ceil'; choose one of floor, scale"),
        ({"task": Task(problem.task.model, name="toxic")}, "'toxic' has no curvature"),
        ({"task": Task(wide, problem.task.curvature)}, r"\[5\] in the base and \[6\] in task 1"),
        ({"task": Task(problem.task.model, only)}, "curvature of task 1 has no block for 'layers.1.w'"),
    ):
        with pytest.raises(ValueError, match=text):
            alpha_path(replace(problem, **change), [1.0])


@pytest.mark.parametrize("alphas", [[], [-0.1], [math.nan], [0.5, math.inf]])
def test_bad_alphas(alphas):
    with pytest.raises(ValueError, match="alphas must be finite"):
        alpha_path(random_problem()[0], alphas)


@pytest.mark.parametrize("options", [{"nats": 0.0}, {"nats": 1.0, "largest": 0.0}, {"nats": 1.0, "steps": 0}])
def test_bad_budgets(options):
    with pytest.raises(ValueError, match="must be positive"):
        budget(random_problem()[0], **options)


def test_a_result_of_another_base_is_refused():
    problem, (base, *_) = random_problem()
    with pytest.raises(ValueError, match=r"lacks 'layers.1.w'"):
        removal_report(problem, 1.0, result={"layers.0.w": base["layers.0.w"]})


def test_a_base_without_curvature_leaves_nothing_to_remove_with():
    problem, (base, _, f0, *_) = random_problem()
    nothing = Curvature.from_dict({name: torch.zeros_like(value) for name, value in f0.items()}, N0)
    flat = Problem(base, problem.task, nothing, delta0=0.0)
    found = budget(flat, 1.0)
    assert (found.alpha, found.bound, found.path) == (0.0, "clamped share", ())
