"""The posterior of a merge: its precision, continual merging, un-merging, and predictions with it."""

import copy
import doctest
import importlib
import json
import pickle

import numpy as np
import pytest
import torch

from gradmatch import Task, merge, open_checkpoint, subtract, unmerge
from gradmatch.cli import main
from gradmatch.estimators import Curvature
from gradmatch.posterior import calibration, draws, predict
from tests.gradmatch.test_system import OUT, WIDTH, curvature, random

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
ALPHAS = (0.7, 0.4, 1.3)
BASE = {"w": random(0, OUT, WIDTH), "b": random(1, OUT)}
MODELS = [{n: v + 0.1 * random(10 + t, *v.shape) for n, v in BASE.items()} for t in range(3)]


def problem(kind, alphas=ALPHAS):
    """Tasks, the base's curvature, and dense precisions of "w" by task and of the base."""
    made = [curvature(t, 10 + t, (OUT, WIDTH), kind == "kronecker") for t in (0, 1, 2, 9)]
    tasks = [Task(m, k[0], a, n) for m, k, a, n in zip(MODELS, made, alphas, "abc", strict=False)]
    return tasks, made[3][0], [k[1] for k in made[:3]], made[3][1]


FAMILY = [
    ("gradient_matching", "diagonal", {}),
    ("gradient_matching", "kronecker", {"structure": "kronecker"}),
    ("kronecker", "kronecker", {}),
    ("fisher", "diagonal", {}),
    ("mats", "kronecker", {}),
]
TIGHT = {"tolerance": 1e-14, "iterations": 2000}


def settings(method, kind, more, h0):
    found = dict(more, method=method, delta0=0.01, **(TIGHT if kind == "kronecker" else {}))
    return found | (
        {"base_curvature": h0, "base_weight": 0.5} if method in ("gradient_matching", "kronecker") else {}
    )


@pytest.mark.parametrize(("method", "kind", "more"), FAMILY)
def test_the_posterior_is_the_sum_of_the_precisions(method, kind, more, tmp_path):
    tasks, h0, hs, h0s = problem(kind)
    found = merge(BASE, tasks, **settings(method, kind, more, h0))
    dense = 0.01 * np.eye(OUT * WIDTH) + sum(a * h for a, h in zip(ALPHAS, hs, strict=True))
    dense = dense + (0.5 * h0s if "base_curvature" in settings(method, kind, more, h0) else 0)
    made = found.posterior
    np.testing.assert_allclose(made.total("w").numpy().ravel(), dense.diagonal(), **CLOSE)
    count = 10 + 11 + 12 + (19 if "base_curvature" in settings(method, kind, more, h0) else 0)
    assert made.num_examples in (count, 33, 43)
    if kind == "kronecker":
        whole = sum(
            np.kron(b, a) for a, b in zip(made.factor_a("w").numpy(), made.factor_b("w").numpy(), strict=True)
        )
        np.testing.assert_allclose(made.num_examples * whole, dense, rtol=1e-9, atol=1e-9)
    made.check_model(
        lambda name: __import__("gradmatch.estimators.fingerprint", fromlist=["x"]).sample_tensor(
            found[name]
        ),
        "the merge",
    )
    out = merge(BASE, tasks, **settings(method, kind, more, h0), out=tmp_path / "out", posterior=True)
    assert sorted(open_checkpoint(tmp_path / "out")) == ["b", "w"]
    stored = Curvature.load(tmp_path / "out" / "posterior.safetensors", model=dict(out))
    assert out.posterior.info == stored.info
    torch.testing.assert_close(stored.total("w"), made.total("w"), **CLOSE)


@pytest.mark.parametrize(("method", "kind", "more"), FAMILY)
def test_a_task_is_taken_out_again(method, kind, more, tmp_path):
    tasks, h0, *_ = problem(kind)
    how = settings(method, kind, more, h0)
    whole, expected = merge(BASE, tasks, **how), merge(BASE, tasks[:2], **how)
    found = unmerge(whole, whole.posterior, tasks[2])
    left = merge(BASE, tasks[:1], **how)
    twice = unmerge(found, found.posterior, tasks[1])
    for name in BASE:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
        torch.testing.assert_close(found.posterior.total(name), expected.posterior.total(name), **CLOSE)
        torch.testing.assert_close(twice[name], left[name], rtol=1e-9, atol=1e-9)
    merge(BASE, tasks, **how, out=tmp_path / "out", posterior=True)
    again = unmerge(
        tmp_path / "out",
        None,
        tasks[2],
        base=BASE,
        base_curvature=how.get("base_curvature"),
        out=tmp_path / "two",
    )
    torch.testing.assert_close(again["w"], expected["w"], **CLOSE)


def test_without_a_floor_fisher_needs_no_base_to_be_taken_apart():
    tasks, *_ = problem("diagonal")
    whole = merge(BASE, tasks, method="fisher", delta0=0.0)
    found = unmerge(dict(whole), whole.posterior, tasks[0])
    expected = merge(BASE, tasks[1:], method="fisher", delta0=0.0)
    torch.testing.assert_close(found["w"], expected["w"], **CLOSE)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
def test_a_merge_is_a_task_of_the_next_one(kind):
    """Merging a and b and then c is merging all three: the merge stands for its tasks with the sum of their precisions."""
    tasks, *_ = problem(kind)
    method, more = ("mats", TIGHT) if kind == "kronecker" else ("fisher", {})
    first = merge(BASE, tasks[:2], method=method, delta0=0.0, **more)
    second = merge(
        BASE, [Task(dict(first), first.posterior, 1.0), tasks[2]], method=method, delta0=0.0, **more
    )
    whole = merge(BASE, tasks, method=method, delta0=0.0, **more)
    for name in BASE:
        torch.testing.assert_close(second[name], whole[name], **CLOSE)


def test_the_posterior_is_the_next_bases_curvature():
    """A task that was fine-tuned from the merge, with the posterior as its prior (Eq. 8): Eq. 12 goes to the joint minimum."""
    tasks, h0, *_ = problem("diagonal", (1.0, 1.0, 1.0))
    first = merge(BASE, tasks[:2], base_curvature=h0, delta0=0.0)
    p, h = first.posterior.total("w"), tasks[2].curvature.total("w")
    minimum = random(90, OUT, WIDTH)
    tuned = {"w": (p * first["w"] + h * minimum) / (p + h), "b": first["b"]}
    known = Curvature.from_dict({"w": h, "b": torch.ones(OUT).double()}, 1)
    second = merge(dict(first), [Task(tuned, known)], base_curvature=first.posterior, delta0=0.0)
    torch.testing.assert_close(second["w"], (p * first["w"] + h * minimum) / (p + h), **CLOSE)
    half = merge(dict(first), [Task(tuned, known, 0.5)], base_curvature=first.posterior, delta0=0.0)
    torch.testing.assert_close(half["w"], (p * first["w"] + 0.5 * h * minimum) / (p + 0.5 * h), **CLOSE)


def made(method="gradient_matching", delta0=0.01, **more):
    tasks, h0, *_ = problem("diagonal")
    base = {} if method == "fisher" else {"base_curvature": h0}
    return tasks, h0, merge(BASE, tasks, method=method, delta0=delta0, **base, **more)


def whole(kind, mixed=False, **more):
    """A merge, and its posterior."""
    tasks, h0, *_ = problem(kind)
    if mixed:
        h0 = problem("diagonal")[1]
    method = "kronecker" if kind == "kronecker" else "gradient_matching"
    found = merge(BASE, tasks, method=method, base_curvature=h0, delta0=0.01, **more)
    return found, found.posterior


def test_directions_that_no_curvature_sees_are_taken_out_too():
    """Factors of few examples have no full rank; there the task was added as in task arithmetic, and is subtracted again."""

    def low(seed):
        a, b = (x @ x.T for x in (random(seed, WIDTH, 2), random(seed + 1, OUT, 2)))
        diagonal = torch.outer(b.diagonal(), a.diagonal())
        return Curvature.from_dict(
            {"w": diagonal, "b": torch.ones(OUT).double()}, 10, factor_a={"w": a}, factor_b={"w": b}
        )

    tasks = [Task(m, low(50 + 2 * t), 1.0, n) for t, (m, n) in enumerate(zip(MODELS, "ab", strict=False))]
    how = dict(TIGHT, method="kronecker", base_curvature=low(60), delta0=0.01)
    both = merge(BASE, tasks, **how)
    found, expected = unmerge(both, both.posterior, tasks[1]), merge(BASE, tasks[:1], **how)
    torch.testing.assert_close(found["w"], expected["w"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("more", "told"), [({}, True), (TIGHT, False)])
def test_a_merge_whose_tasks_stay_says_so_when_it_is_made(more, told, tmp_path):
    tasks, h0, *_ = problem("kronecker")
    how = dict(more, method="kronecker", base_curvature=h0, delta0=0.01, out=tmp_path / "out", posterior=True)
    notes = merge(BASE, tasks, **how).report.notes
    assert any("no task can be taken out of this merge" in note for note in notes) is told


TASKS, H0, WHOLE = made()
REFUSED = [
    (lambda: merge(BASE, TASKS, method="averaging").posterior, "averaging has no posterior"),
    (lambda: merge(BASE, TASKS, method="wudi", posterior=True), "wudi has no posterior"),
    (lambda: unmerge(WHOLE, H0, TASKS[0]), "a curvature of 'given' is no posterior of a merge"),
    (lambda: unmerge(WHOLE, None, TASKS[0]), "unmerge needs the posterior of the merge"),
    (lambda: unmerge(dict(WHOLE), WHOLE.posterior, TASKS[0]), r"gradient_matching is taken apart with base and base_curvature="),
    (lambda: unmerge(dict(WHOLE), WHOLE.posterior, TASKS[0], base=BASE), r"is taken apart with base_curvature="),
    (lambda: unmerge(WHOLE, WHOLE.posterior, Task(MODELS[0], TASKS[0].curvature, 0.5, "a")), "a was merged with the weight 0.7, not 0.5"),
    (lambda: unmerge(WHOLE, WHOLE.posterior, Task(MODELS[0], TASKS[0].curvature, 0.7, "d")), "no task 'd' was merged"),
    (lambda: unmerge(WHOLE, WHOLE.posterior, Task(MODELS[0], TASKS[0].curvature, 70.0)), "nothing is left of the posterior without the task"),
    (lambda: unmerge(BASE, WHOLE.posterior, TASKS[0], base=BASE, base_curvature=H0), "was taken at other weights than the base"),
    (lambda: unmerge(WHOLE, merge(BASE, TASKS, method="removal", base_curvature=H0, base_weight=99.0).posterior, TASKS[0]), "merge by removal"),
    (lambda: unmerge(*whole("kronecker"), TASKS[0]), "matrices were not solved to 1e-10: merge with solver='exact'"),
    (lambda: unmerge(*whole("kronecker", solver="exact"), TASKS[0]), "were not solved to 1e-10"),
    (lambda: unmerge(*whole("kronecker", mixed=True, **TIGHT), TASKS[0]), "'w' some curvatures have factors and others a diagonal"),
    (lambda: unmerge(*whole("diagonal", hbar_weight=1.0), TASKS[0]), "merged with hbar_weight"),
    (lambda: unmerge(*whole("diagonal", transforms=["dare"]), TASKS[0]), "task vectors were edited by dare"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_has_no_posterior_or_is_not_of_it_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_only_a_task_is_taken_out():
    with pytest.raises(TypeError, match="what is taken out is a Task"):
        unmerge(WHOLE, WHOLE.posterior, MODELS[0])


def test_a_merge_is_copied_and_pickled_without_its_plan():
    again = pickle.loads(pickle.dumps(WHOLE))
    assert torch.equal(again["w"], WHOLE["w"])
    assert again.report.method == copy.deepcopy(WHOLE).report.method == "gradient_matching"


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, tensors in zip(("base", "a", "b"), (BASE, *MODELS), strict=False):
        merge(tensors, [Task(tensors)], method="averaging", out=name)
    for name, known in zip("ab", TASKS, strict=False):
        known.curvature.save(f"{name}.safetensors")
    H0.save("h0.safetensors")
    both = ["--base", "base", "--base-curvature", "h0.safetensors"]
    tasks = ["--task", "a,curvature=a.safetensors,weight=0.7", "--task", "b,curvature=b.safetensors"]
    assert main(["merge", *both, *tasks, "--posterior", "-o", "both", "--quiet"]) == 0
    assert (
        main(["unmerge", "both", "--task", "b,curvature=b.safetensors", *both, "-o", "one", "--quiet"]) == 0
    )
    expected = merge(BASE, [TASKS[0]], base_curvature=H0)
    torch.testing.assert_close(open_checkpoint("one")["w"], expected["w"], **CLOSE)
    assert Curvature.load("one/posterior.safetensors").info["weights"] == '{"a": 0.7}'
    assert main(["unmerge", "both", "--task", "c,curvature=b.safetensors", "-o", "two", "--quiet"]) == 2
    assert (
        main(["merge", *both, *tasks, "--method", "anchored", "--anchor", "one", "-o", "held", "--quiet"])
        == 0
    )
    assert json.loads((tmp_path / "held" / "gradmatch.json").read_text())["recipe"]["anchor"]
    found = merge(BASE, [Task(MODELS[0], TASKS[0].curvature, 0.7), Task(MODELS[1], TASKS[1].curvature)], method="anchored", base_curvature=H0, anchor=expected)  # fmt: skip
    torch.testing.assert_close(open_checkpoint("held")["w"], found["w"], **CLOSE)
    flags = ["--base", "base", "--base-curvature", "h0.safetensors", "--method", "ascent", "--weight", "0.5"]
    TASKS[0].curvature.save("g.safetensors")
    assert main(["subtract", *flags, "--gradient", "g.safetensors", "-o", "up", "--quiet"]) == 0
    assert main(["subtract", *flags, "--gradient", "g.safetensors", "--dry-run"]) == 0
    risen = subtract(BASE, None, method="ascent", base_curvature=H0, gradient=TASKS[0].curvature, weight=0.5)
    torch.testing.assert_close(open_checkpoint("up")["w"], risen["w"], **CLOSE)
    capsys.readouterr()


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "conv1d"])
def test_draws_have_the_posteriors_covariance(kind):
    shape = (WIDTH, OUT) if kind == "conv1d" else (OUT, WIDTH)
    known, dense, flat = curvature(3, 5, shape, kind != "diagonal", kind == "conv1d")
    side = (lambda w: w.T) if kind == "conv1d" else (lambda w: w)
    found = list(draws(known, 6000, seed=1, scale=2.0))
    rows = torch.stack([side(one["w"]).flatten() for one in found])
    np.testing.assert_allclose(
        rows.T.cov().numpy(), 2 * np.linalg.inv(dense), atol=0.1 * np.abs(np.linalg.inv(dense)).max()
    )
    np.testing.assert_allclose(torch.stack([one["b"] for one in found]).var(0).numpy(), 2 / flat, rtol=0.1)
    again = next(iter(draws(known, 1, seed=1, scale=2.0)))
    assert torch.equal(again["w"], found[0]["w"])


def test_draws_of_a_square_conv1d_layer_lie_as_the_posteriors_diagonal_does():
    a, b = torch.diag(torch.tensor([1.0, 100.0])).double(), torch.eye(2).double()
    diagonal = torch.outer(b.diagonal(), a.diagonal())
    for stored in (diagonal, diagonal.T.contiguous()):
        known = Curvature.from_dict({"w": stored}, 1, factor_a={"w": a}, factor_b={"w": b})
        variance = torch.stack([one["w"] for one in draws(known, 2000)]).var(0)
        torch.testing.assert_close(variance, 1 / stored, rtol=0.2, atol=0)


def test_the_linearised_variance_of_a_linear_model_is_known():
    model = torch.nn.Linear(WIDTH, OUT).double()
    x, y = random(5, 6, WIDTH), torch.arange(6) % OUT
    a, b = curvature(3, 5, (OUT, WIDTH), True)[0], random(8, OUT).square() + 0.5
    known = Curvature.from_dict(
        {"weight": a.mean("w"), "bias": b / 5},
        5,
        factor_a={"weight": a.factor_a("w")},
        factor_b={"weight": a.factor_b("w")},
    )
    found = predict(model, [(x[:2], y[:2]), (x[2:], y[2:])], known, samples=800)
    inverse = (
        torch.linalg.inv(a.factor_b("w")).diagonal()[None]
        * ((x @ torch.linalg.inv(a.factor_a("w"))) * x).sum(1)[:, None]
        / 5
    )
    torch.testing.assert_close(found.variance, inverse + 1 / b, rtol=0.25, atol=0)
    torch.testing.assert_close(found.plain, model(x).softmax(-1).detach())
    assert torch.equal(found.labels, y)
    assert float(found.probabilities.max()) < float(found.plain.max())  # less sure
    sure = predict(model, [(x, y)], known, samples=2, scale=0.0)
    torch.testing.assert_close(sure.probabilities, sure.plain)


@pytest.mark.parametrize("module", ["gradmatch.posterior.predicting", "gradmatch.posterior.unmerging"])
def test_examples_run(module):
    assert not doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS).failed


def test_calibration_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.3, 0.7]])
    found = calibration(p, torch.tensor([0, 1, 0, 1]), bins=2)
    assert found.accuracy == 0.75
    assert found.nll == pytest.approx(-np.log([0.9, 0.4, 0.55, 0.7]).mean())
    assert found.ece == pytest.approx(abs(3 - (0.9 + 0.6 + 0.55 + 0.7)) / 4)


NET = torch.nn.Linear(2, 2)
KNOWN = Curvature.from_dict({n: torch.ones_like(p) for n, p in NET.named_parameters()}, 1)
DATA = [(torch.ones(3, 2), torch.zeros(3).long())]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: list(draws(KNOWN, 0)), "count is 0"),
        (lambda: list(draws(Curvature.from_dict({"w": torch.zeros(2)}, 1))), "'w': 2 precisions are not positive"),
        (lambda: predict(NET, DATA, Curvature.from_dict({"w": torch.ones(2)}, 1)), "the posterior holds 'w', which is no parameter"),
        (lambda: predict(NET, [], KNOWN), "no batches"),
        (lambda: predict(NET, [(torch.ones(3, 4, 2), torch.zeros(3, 4).long())], KNOWN), r"logits have shape \[3, 4, 2\]"),
        (lambda: calibration(torch.ones(3, 2) / 2, torch.tensor([0, 1, 2])), "of the classes 0 to C - 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
