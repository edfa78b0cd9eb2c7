"""Rules of one's own: found by name, by place and by entry point, as every command and report treats ours; what is wrong is named."""

import doctest
import importlib.metadata
import json
import re
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gradmatch import RULES, Rule, Task, diagnose, merge, rules
from gradmatch.estimators.errors import GradmatchError
from gradmatch.rules import Elementwise, Linear, Options, Solve, Whole, find_rule, option
from gradmatch.testing import check_rule
from tests.command import run
from tests.gradmatch.cases import curvature, problem, state, tuned

README = (Path(rules.__file__).parent / "README.md").read_text(encoding="utf-8")
BASE, H0, MODELS, CURVATURES = problem(2)
TASKS = [Task(model, name=name) for model, name in zip(MODELS, "ab", strict=True)]
RULE_MODULES = [
    "gradmatch.rules",
    *(f"gradmatch.rules.{one.stem}" for one in Path(rules.__file__).parent.glob("[a-z]*.py")),
]
LACKS = {"single": "it halves", "equal": "it halves"}


def half(block):
    return block.theta0 + 0.5 * (block.alpha * block.tau).sum(0)


def sizes(tau, alpha, *_):
    return sum(weight * one.abs() for weight, one in zip(alpha, tau, strict=True))


HALF = Rule(
    "theta0 + sum_t alpha_t tau_t / 2", "mine", elementwise=half, lacks=LACKS, options={"unused": 1.0}
)


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(RULES, "half", HALF)


def test_rule_makes_the_kind_of_its_function():
    kinds = {"linear": Linear, "elementwise": Elementwise, "whole": Whole}
    for kind, cls in kinds.items():
        assert type(Rule("f", "s", **{kind: lambda *_: None})) is cls
    assert type(Rule("f", "s", solve=lambda *_: None, otherwise=HALF)) is Solve


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({}, TypeError, "exactly one function, as one of linear, elementwise, whole, solve; got 0"),
        ({"whole": half, "linear": half}, TypeError, "got 2 of them"),
        ({"whole": 3}, TypeError, "whole must be a function, not 3"),
        ({"whole": half, "needs": {"curvatur"}}, ValueError, r"one of needs is 'curvatur' \(did you mean 'curvature'\?\); choose one of"),
        ({"linear": half, "gram": "taus"}, ValueError, r"gram is 'taus' \(did you mean 'tau'\?\); choose one of '', theta, tau"),
        ({"whole": half, "lacks": {"singel": "x"}}, ValueError, r"one of lacks is 'singel' \(did you mean 'single'\?\)"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be(given, error, text):
    with pytest.raises(error, match=text):
        Rule("f", "s", **given)


@pytest.mark.parametrize(
    ("models", "text"),
    [((1, 1), "takes 1 task, got 2"), ((3, 3), "takes 3 tasks, got 2"), ((3, 9), "takes at least 3 tasks, got 2"), ((1, 1.0), "takes 1 task, got 2")],
)  # fmt: skip
def test_how_many_models_a_rule_takes(monkeypatch, models, text):
    monkeypatch.setitem(RULES, "few", Rule("f", "s", elementwise=half, models=models))
    with pytest.raises(ValueError, match=text):
        merge(BASE, TASKS, method="few")


def test_a_registered_rule_is_treated_as_ours(own, tmp_path):
    found = merge(BASE, TASKS, method="half", out=tmp_path / "out")
    for name, theta0 in BASE.items():
        torch.testing.assert_close(found[name], theta0 + sum(m[name] - theta0 for m in MODELS) / 2)
    assert found.report.floor_share is None  # it knows no curvature, so no floor decides
    assert found.report.formula == HALF.formula
    assert found.report.tensors == {"elementwise": len(BASE)}
    card = json.loads((tmp_path / "out" / "gradmatch.json").read_text())["recipe"]
    assert (card["formula"], card["source"], card["options"]) == (HALF.formula, "mine", {"unused": 1.0})
    assert diagnose(BASE, TASKS, method="half").evidence.method == "half"


def test_a_rule_by_its_place_in_recipe_and_command(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rules.py").write_text(
        "from gradmatch import Rule\n"
        "HALF = Rule('theta0 + sum_t tau_t / 2', 'mine', elementwise=lambda b: b.theta0 + b.tau.sum(0) / b.options.by,\n"
        "            options={'by': 2.0})\n"
    )
    for name, tensors in zip(("base", "a", "b"), (BASE, *MODELS), strict=True):
        merge(tensors, [Task(tensors)], method="averaging", out=tmp_path / name)
    recipe = "{base: base, tasks: [a, b], method: 'my_rules:HALF', options: {by: 4.0}}"
    (tmp_path / "r.yaml").write_text(recipe)
    flags = f"--base {tmp_path}/base --task {tmp_path}/a --task {tmp_path}/b --method my_rules:HALF"
    for arguments, by in ((tmp_path / "r.yaml", 4), (flags, 2), (f"{flags} --option by=8", 8)):
        assert run(f"merge {arguments} -o {tmp_path}/out{by} --quiet") == 0
        found = merge(BASE, [Task(tmp_path / f"out{by}")], method="averaging")
        for name, theta0 in BASE.items():
            torch.testing.assert_close(found[name], theta0 + sum(m[name] - theta0 for m in MODELS) / by)
    assert "my_rules:HALF: theta0 + sum_t tau_t / 2" in capsys.readouterr().out
    assert run(f"merge {flags} --option buy=8 --dry-run") == 2
    assert "has no option 'buy' (did you mean 'by'?); it takes by" in capsys.readouterr().err


def test_a_rule_of_an_installed_package(monkeypatch):
    point = types.SimpleNamespace(name="halved", load=lambda: HALF)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == "gradmatch.rules" else []
    )
    assert find_rule("halved") is HALF
    with pytest.raises(ValueError, match=r"unknown method 'halvd' \(did you mean 'halved'\?\)"):
        find_rule("halvd")


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        ("math:pii", ValueError, r"module 'math' holds no 'pii' \(did you mean 'pi'\?\)"),
        ("math:pi", TypeError, "method 'math:pi' is a float, not a gradmatch.Rule"),
        ("avraging", ValueError, r"'avraging' \(did you mean 'averaging'\?\); known are averaging, "),
    ],
)
def test_rules_that_are_not_there(method, error, text):
    with pytest.raises(error, match=text):
        merge(BASE, TASKS, method=method)


READS = {
    "h": "curvature",
    "counts": "curvature",
    "norms": "curvature",
    "h0": "base_curvature",
    "g": "gradient",
}


@pytest.mark.parametrize(("attribute", "need"), READS.items())
def test_what_a_rule_does_not_need_it_cannot_read(attribute, need, monkeypatch):
    rule = Rule("f", "s", elementwise=lambda b: getattr(b, attribute))
    monkeypatch.setitem(RULES, "reads", rule)
    with pytest.raises(ValueError, match=rf"reads '{attribute}' of its block .*: add needs=\{{'{need}'\}}"):
        merge(BASE, TASKS, method="reads")


def test_a_rule_with_curvature_has_all_of_it(monkeypatch):
    seen = {}

    def look(block):
        seen.update(vars(block))
        return block.theta0

    rule = Rule("theta0", "mine", elementwise=look, needs={"curvature", "base_curvature", "gradient"})
    monkeypatch.setitem(RULES, "looks", rule)
    known = [
        Task({"w": m["norm.bias"]}, curvature({"w": m["norm.bias"]}, t, 7, gradient=True), 0.5)
        for t, m in enumerate(MODELS)
    ]
    merge({"w": BASE["norm.bias"]}, known, method="looks", base_curvature=2.0, base_weight=3.0, delta0=0.25)
    assert seen["h0"].tolist() == [6.25] * 4
    assert seen["counts"].tolist() == [[7.0]] * 2
    for t, task in enumerate(known):
        torch.testing.assert_close(seen["h"][t], task.curvature.total("w"))
        torch.testing.assert_close(seen["g"][t], task.curvature.gradient("w"))


def test_a_rule_that_solves_gets_the_curvature_of_the_matrix(monkeypatch):
    from tests.gradmatch.test_rules import gram_curvature

    def mean(theta0, tau, alpha, curved):
        product = curved.h[0]
        torch.testing.assert_close(
            product(theta0), product.scale * product.b @ theta0 @ product.a + product.diagonal * theta0
        )
        curved.health["iterations"], curved.health["residual"] = 3.0, 0.0
        return theta0 + tau.mean(0)

    settings = {"needs": {"curvature", "factors"}, "options": {"tolerance": 0.1}}
    settings["lacks"] = {"zero": "weights play no role"}
    rule = Rule("mean", "mine", solve=mean, otherwise=RULES["averaging"], **settings)
    monkeypatch.setitem(RULES, "solved", rule)
    base = state(0, shapes={"w": (3, 5), "b": (3,)})
    models = [tuned(base, t) for t in (1, 2)]
    found = merge(base, [Task(m, gram_curvature(m, 1, 10, kfac=True)) for m in models], method="solved")
    for name in base:
        torch.testing.assert_close(found[name], (models[0][name] + models[1][name]) / 2)
    assert found.report.tensors == {"solve": 1, "linear": 1}
    assert found.report.solves == {"w": {"iterations": 3.0, "residual": 0.0}}
    check_rule(rule)


BROKEN = [
    (3, "a rule is a gradmatch.Rule, not int"),
    (Rule("", "s", elementwise=half), "the rule has no formula"),
    (Rule("f", "s", elementwise=half, models=(2, 1)), r"models is \(2, 1\)"),
    (Rule("f", "s", elementwise=half, models=(2, 3)), "lacks 'single': say lacks="),
    (Rule("f", "s", elementwise=half, lacks={"single": ""}), r"lacks\['single'\] gives no reason"),
    (Rule("f", "s", whole=lambda *_: 0, otherwise=3), "otherwise is a int, not a gradmatch.Rule"),
    (Rule("f", "s", whole=lambda *_: 0, otherwise=RULES["fisher"]), "otherwise needs curvature, which the rule itself does not"),
    (Rule("f", "s", whole=lambda t, tau, a, o: t + sizes(tau, a), update=sizes, lacks=LACKS), "update does not turn with its task vectors"),
    (Rule("f", "s", whole=lambda t, tau, a, o: t + 2 * sizes(tau, a), update=sizes, lacks=LACKS), "update is not what the rule adds"),
    (Rule("f", "s", elementwise=lambda b: b.tau), r"must return a tensor of shape \[.*\], got \["),
    (Rule("f", "s", elementwise=lambda b: 3), "must return a tensor of shape .*, got int"),
    (Rule("f", "s", whole=lambda t, tau, a, o: t / 0 * 0), "small models cannot be merged: GradmatchError: .* NaN or infinite"),
    (Rule("f", "s", elementwise=lambda b: b.theta0 + b.tau.sum(0) + 1e-9 * torch.rand(1)), "is another one at every call; draw from a seed"),
    (Rule("f", "s", whole=lambda t, tau, a, o: t.add_(tau.sum(0)) and t), "small models cannot be merged"),
    (Rule("f", "s", elementwise=lambda b: b.theta0 + b.tau.sum(0) - b.tau.sum(0).mean()), "must look at one coordinate alone"),
    (Rule("f", "s", elementwise=half), "'single' does not hold"),
    (Rule("f", "s", linear=lambda a, g, o: (0.0, [1.0])), "the rule gives 1 coefficients for 3 tasks"),
    (Rule("f", "s", elementwise=half, lacks={**LACKS, "order": "x"}), "lacks names 'order', but it holds"),
    (Rule("f", "s", linear=lambda a, g, o: (0.0, [1.0 / len(a)] * len(a))), "'zero' does not hold"),
    (Rule("f", "s", elementwise=lambda b: (b.alpha * (b.theta0 + b.tau)).sum(0) / b.alpha.sum(), relative=True), "'zero' cannot be had"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "text"), BROKEN, ids=lambda value: str(value)[:40])
def test_what_a_rule_does_not_keep_is_named(rule, text):
    with pytest.raises(AssertionError, match=text):
        check_rule(rule)
    assert "the rule under test" not in RULES


def test_rules_of_each_kind_that_keep_their_promises():
    def whole(theta0, tau, alpha, _):
        return theta0 + (tau.new_tensor(alpha).reshape(-1, *[1] * theta0.dim()) * tau).sum(0)

    check_rule(HALF)
    check_rule(Rule("f", "s", whole=whole))


@dataclass(frozen=True)
class Times(Options):
    by: float = option(1.0, "[0, 2]")


@pytest.mark.parametrize("options", [Times(), {"by": 1.0}], ids=["dataclass", "table"])
def test_options_check_themselves_and_may_differ_by_tensor(options, monkeypatch):
    rule = Rule("f", "s", elementwise=lambda b: b.theta0 + b.options.by * b.tau.sum(0), options=options)
    monkeypatch.setitem(RULES, "by", rule)
    found = merge(BASE, TASKS[:1], method="by", by={"*norm*": 0.0, "*": 1.0})
    assert all(torch.equal(found[n], BASE[n]) == ("norm" in n) for n in BASE)
    with pytest.raises(TypeError, match="by: by is 'much'; it must be a number"):
        merge(BASE, TASKS, method="by", by="much")
    if isinstance(options, Times):
        with pytest.raises(GradmatchError, match=r"by: by is 3, it must lie in \[0, 2\]") as error:
            merge(BASE, TASKS, method="by", by=[0.0, 3.0])
        assert (error.value.code, error.value.where) == ("out_of_range", "by")


def test_the_readme_has_a_row_of_every_rule_and_its_example_runs(monkeypatch):
    table = README.partition("## A rule of one's own")[0]
    assert [name for name in RULES if f"`{name}`" not in table] == []
    monkeypatch.setitem(RULES, "largest", None)
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    exec(compile(example, "README.md", "exec"), {})
    found = merge(BASE, TASKS, method="largest", scale=0.5)
    name = "norm.bias"
    taus = torch.stack([m[name] - BASE[name] for m in MODELS])
    largest = torch.where(taus[0].abs() > taus[1].abs(), taus[0], taus[1])
    torch.testing.assert_close(found[name], BASE[name] + 0.5 * largest)


@pytest.mark.parametrize("module", ["gradmatch.testing", "gradmatch.estimators.parts", *RULE_MODULES])
def test_examples_run(module):
    found = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    )
    assert found.failed == 0
