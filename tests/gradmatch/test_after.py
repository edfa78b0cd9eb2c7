"""Edits of the merged update against loops over directions and layers."""

import json

import pytest
import torch

from gradmatch import AFTER, Task, merge
from gradmatch.cli import main
from gradmatch.engine import context
from gradmatch.estimators import Curvature
from gradmatch.merging import prepare
from gradmatch.plan.printed import describe
from gradmatch.rules.singular import polar, triplets
from tests import oracle
from tests.gradmatch.cases import state, tuned

SHAPES = {
    "embed.w": (9, 6),
    "layers.0.w": (7, 9),
    "layers.1.conv": (6, 2, 2, 2),
    "layers.2.b": (5,),
    "norm.scale": (),
}
DEPTHS = {"embed.w": 0.0, "layers.0.w": 0.0, "layers.1.conv": 0.5, "layers.2.b": 1.0, "norm.scale": 1.0}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
RULES = {
    "task_arithmetic": {},
    "averaging": {},
    "slerp": {"t": 0.3},
    "nuslerp": {"along": "rows"},
    "ties": {"density": 0.5},
    "tsv_m": {},
    "sce": {},
    "gradient_matching": {"base_curvature": 0.5},
}


def models(dtype=torch.float64):
    """A base and two fine-tunes that have something in common."""
    base = state(0, dtype, shapes=SHAPES)
    return base, [tuned(tuned(base, 77), seed) for seed in (1, 2)]


def pair(method, dtype=torch.float64):
    """What `merge` is given, with and without the edits that it is asked for."""
    base, found = models(dtype)
    known = [
        Curvature.from_dict({name: value.abs() + 0.1 for name, value in one.items()}, 9) for one in found
    ]
    needs = "curvature" if method == "gradient_matching" else ""
    tasks = [Task(one, h if needs else None) for one, h in zip(found, known, strict=True)]
    call = {"method": method, **RULES.get(method, {})}
    return base, found, lambda **more: merge(base, tasks, **call, **more)


@pytest.mark.parametrize("least", [None, 1.0])
@pytest.mark.parametrize("method", RULES)
def test_svc_scales_singular_values_behind_any_rule(method, least, monkeypatch):
    monkeypatch.setattr(context, "BLOCK", 16)  # so that a matrix is put together from pieces
    base, found, merged = pair(method)
    plain, after = merged(), merged(after=[{"svc": {"least": least}}])
    for name, theta0 in base.items():
        expected = plain[name]
        if theta0.dim() >= 2:
            taus = [one[name] - theta0 for one in found]
            expected = theta0 + oracle.svc(plain[name] - theta0, taus, least)
        torch.testing.assert_close(after[name], expected, **CLOSE)
    assert after.report.formula.endswith("; theta - theta0 edited after by svc")


@pytest.mark.parametrize("options", [{}, {"alpha": 0.2}, {"beta": 0.0}, {"alpha": 0.5, "beta": -0.1}])
@pytest.mark.parametrize("method", RULES)
def test_lines_scales_by_depth(method, options):
    base, _, merged = pair(method)
    plain, after = merged(), merged(after="lines", **options)
    alpha = options.get("alpha", 0.5)
    beta = options.get("beta", 1 - alpha)
    for name, theta0 in base.items():
        expected = theta0 + (alpha + beta * DEPTHS[name]) * (plain[name] - theta0)
        torch.testing.assert_close(after[name], expected, **CLOSE)


def test_edits_follow_one_another():
    base, found, merged = pair("task_arithmetic")
    plain, after = merged(), merged(after=["svc", {"lines": {"alpha": 0.3, "beta": 0.0}}])
    for name in ("embed.w", "layers.0.w"):
        svc = oracle.svc(plain[name] - base[name], [one[name] - base[name] for one in found])
        torch.testing.assert_close(after[name], base[name] + 0.3 * svc, **CLOSE)


def test_tasks_of_weight_zero_are_not_compared_with():
    base, found = models()
    tasks = [Task(found[0]), Task(found[1], weight=0.0)]
    both = merge(base, tasks, method="task_arithmetic", after="svc")
    one = merge(base, tasks[:1], method="task_arithmetic", after="svc")
    none = merge(
        base, [Task(one, weight=0.0) for one in found], method="task_arithmetic", after=["svc", "lines"]
    )
    for name in base:
        torch.testing.assert_close(both[name], one[name], **CLOSE)
        torch.testing.assert_close(one[name], found[0][name], **CLOSE)
        assert torch.equal(none[name], base[name])


def test_directions_without_a_response_count_as_least():
    base = {"w": torch.zeros(4, 3)}
    one, two = torch.zeros(4, 3), torch.zeros(4, 3)
    one[0, 0], two[1, 1], two[2, 1] = 3.0, 1e-3, 1e-12  # apart from one another, with rounding beside
    after = merge(base, [Task({"w": one}), Task({"w": two})], method="task_arithmetic", after="svc")["w"]
    assert after[0, 0] == pytest.approx(3 * 2 / 1.5)
    assert after[1, 1] == pytest.approx(1e-3 * 2 / 1.5)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
@pytest.mark.parametrize("decades", [2, 4])
def test_float32_loses_no_more_by_gram_matrices_than_by_an_svd(shape, decades):
    generator = torch.Generator().manual_seed(0)
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0] for n in shape)
    s = torch.logspace(0, -decades, rank, dtype=torch.float64)
    matrix = ((u * s) @ v.T).float()
    found = triplets(matrix)
    plain = torch.linalg.svd(matrix, full_matrices=False)
    assert len(found[1]) == rank

    def apart(left, right):  # of directions, whatever their signs
        return float((left.double().mT @ right).diagonal().abs().sub(1).abs().max())

    assert apart(found[0], u) <= max(2 * apart(plain[0], u), 1e-6)
    assert apart(found[2].mT, v) <= max(2 * apart(plain[2].mT, v), 1e-6)
    torch.testing.assert_close(found[1].double(), s, rtol=1e-4, atol=1e-7)
    if decades > 2:
        return  # of directions side by side, as small ones are those that coincide
    exact = polar(matrix.double())
    error, usual = ((x.double() - exact).norm() for x in (polar(matrix), plain[0] @ plain[2]))
    assert error <= max(2 * usual, 1e-5)


def test_a_plan_says_what_is_edited_and_what_it_holds():
    base, found = models(torch.float32)
    made = prepare(base, [Task(one) for one in found], method="averaging", after=["svc", "lines"], least=1.0)
    lines = {line.split("  ")[0].strip(): line for line in describe(made)}
    assert "svc {'least': 1.0}, lines {'alpha': None, 'beta': None}" in "\n".join(lines.values())
    assert lines["layers.2.b"].endswith("no matrix: not edited by svc")
    assert [step.assembles for step in made.steps] == [True, True, True, False, False]


def test_commands_and_cards_know_them(tmp_path, capsys):
    from safetensors.torch import save_file

    base, found = models(torch.float32)
    for name, one in {"base": base, "a": found[0], "b": found[1]}.items():
        save_file(one, tmp_path / f"{name}.safetensors")
    call = ["merge", "--base", str(tmp_path / "base.safetensors"), "--method", "task_arithmetic", "--quiet"]
    call += [part for name in "ab" for part in ("--task", str(tmp_path / f"{name}.safetensors"))]
    edits = ["--after", "svc", "--after", "lines", "--least", "1", "--alpha", "0.4"]
    assert main([*call, *edits, "-o", str(tmp_path / "flags")]) == 0
    recipe = {"base": "base.safetensors", "method": "task_arithmetic", "after": ["svc", "lines"]}
    recipe |= {"tasks": ["a.safetensors", "b.safetensors"], "options": {"least": 1, "alpha": 0.4}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "recipe"), "--quiet"]) == 0
    one, two = (
        json.loads((tmp_path / n / "gradmatch.json").read_text())["recipe"] for n in ("flags", "recipe")
    )
    assert one["after"] == two["after"] == [{"svc": {"least": 1.0}}, {"lines": {"alpha": 0.4, "beta": None}}]
    expected = merge(
        base, [Task(x) for x in found], method="task_arithmetic", after=["svc", "lines"], least=1, alpha=0.4
    )
    from gradmatch import open_checkpoint

    for folder in ("flags", "recipe"):
        done = open_checkpoint(tmp_path / folder)
        assert all(torch.equal(done[name], expected[name]) for name in base)


@pytest.mark.parametrize("name", AFTER)
def test_every_edit_says_of_itself_what_plans_need(name):
    edit = AFTER[name]
    assert edit.source
    assert not edit.matrices or edit.memory + edit.square > 0


BASE, FOUND = models()
PLAIN = [Task(one, name=name) for one, name in zip(FOUND, "ab", strict=True)]
REFUSED = [  # keyword arguments of a merge by task arithmetic, and what is said
    ({"after": ["svd"]}, ValueError, r"unknown edit of the merged update 'svd' \(did you mean 'svc'\?\); known are svc, lines"),
    ({"after": [{"svc": {"leest": 1}}]}, ValueError, r"svc has no option 'leest' \(did you mean 'least'"),
    ({"after": "svc", "least": 0.0}, ValueError, r"svc: least is 0, it must lie in \(0, inf\]"),
    ({"after": "svc", "least": "x"}, TypeError, r"svc: least is 'x'"),
    ({"after": [3]}, TypeError, r"an edit of the merged update is a name or \{name: options\}, not 3"),
    ({"after": "svc", "method": "fisher", "posterior": True, "out": "out", "tasks": [Task(FOUND[0], Curvature.from_dict({n: v.abs() for n, v in FOUND[0].items()}, 9))]}, ValueError, r"after=\['svc'\] moves the merge away from the mode"),
    ({"after": "svc", "method": "negation"}, ValueError, r"after=\['svc'\] edits what tasks add, and negation takes them away"),
    ({"after": "svc", "tasks": [PLAIN[0], Task(FOUND[1], weight=-0.5, name="b")]}, ValueError, r"svc compares .* b is taken away \(weight -0.5\)"),
    ({"after": "lines", "base": {"w": torch.zeros(2)}, "tasks": [Task({"w": torch.ones(2)})]}, ValueError, r"lines scales by the layer, and names such as 'w' hold no layers"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=[str(call)[:40] for call, *_ in REFUSED])
def test_what_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        merge(**{"base": BASE, "tasks": PLAIN, "method": "task_arithmetic", **call})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize(
    ("method", "after"), [("tsv_m", ()), ("iso_c", ()), ("iso_cts", ()), ("averaging", "svc")]
)
def test_matrices_that_are_not_finite_are_named(method, after, precision, value):
    broken = {**FOUND[0], "layers.0.w": FOUND[0]["layers.0.w"].clone()}
    broken["layers.0.w"][2, 1] = value
    with pytest.raises(ValueError, match=r"'layers.0.w' holds 1 NaN or infinite values in a"):
        merge(BASE, [Task(broken, name="a"), PLAIN[1]], method=method, after=after, precision=precision)
