"""An estimator of one's own: found by name, by place and by entry point; what it cannot give is refused by name."""

import importlib.metadata
import types

import pytest
import torch

from gradmatch.estimators import ESTIMATORS, Curvature, check_estimator, estimate, fisher
from gradmatch.estimators.protocol import find_estimator
from gradmatch.estimators.sinks import DIAGONAL
from tests.estimators.test_runs import net, pieces, rows


class Gradients:
    """The squared gradient of each batch at the true labels, over its size: what a user may write in ten lines."""

    def start(self, problem):
        problem.label_kind = "true labels"

    def step(self, problem, batch):
        for name, value in gradient(problem, batch).items():
            problem.sums["own/" + name] = problem.sums.get("own/" + name, 0) + value.square() / batch.size

    def finish(self, problem, seen):
        return {"mean": {name: problem.sums["own/" + name] / seen for name in problem.parameters}}


def gradient(problem, batch):
    output = problem.forward(batch)
    likelihood = problem.likelihood_for(output, batch)
    problem.counts["predictions"] += batch.size
    seed = likelihood.true(likelihood.read(output, batch))
    from gradmatch.estimators.sinks import GRADIENT, GradientSink, zeros

    sums = {}
    zeros(problem.parameters, GRADIENT, sums)
    problem.listening.backward(seed, GradientSink(sums))
    return {name.removeprefix(GRADIENT): value for name, value in sums.items()}


class Claims(Gradients):
    GIVES = ("standard_error", "gradient", "tolerance")


class Sums(Gradients):
    def finish(self, problem, seen):
        return {"mean": {name: problem.sums["own/" + name] for name in problem.parameters}}


class Other(Gradients):
    def finish(self, problem, seen):
        return {"mean": {"x": torch.ones(2)}}


class Restless(Gradients):
    def step(self, problem, batch):
        super().step(problem, batch)
        problem.sums["own/0.weight"] += torch.rand(())


class Nothing(Gradients):
    def finish(self, problem, seen):
        return {}


OWN = Gradients()
HALF = types.SimpleNamespace(start=print, step=print)
ODD = types.SimpleNamespace(start=print, step=print, finish=print, GIVES="tolerence")


BATCHES = pieces(*rows(200))


NOT_GIVEN = {  # option, and what is said of an estimator that claims to give it and does not
    "tolerance": (0.3, "tolerance has nothing to watch: .* adds to no diagonal/<parameter>"),
    "standard_error": (True, "method='mine' did not deliver standard_error"),
    "gradient": (True, "did not deliver the gradient of '0.weight'"),
}


@pytest.mark.parametrize("claims", [False, True])
@pytest.mark.parametrize("option", NOT_GIVEN)
def test_what_it_does_not_give_is_refused_by_name(monkeypatch, option, claims):
    monkeypatch.setitem(ESTIMATORS, "mine", Claims() if claims else OWN)
    value, said = NOT_GIVEN[option]
    message = said if claims else f"{option} is not available for method='mine', which gives none"
    with pytest.raises(ValueError, match=message):
        estimate(net(), BATCHES, method="mine", progress=False, **{option: value})


@pytest.mark.parametrize("place", ["tests.estimators.test_own:OWN", "entry"])
def test_it_is_found_by_place_and_by_entry_point(place, monkeypatch):
    entry = importlib.metadata.EntryPoint("entry", "tests.estimators.test_own:OWN", "gradmatch.estimators")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    found = estimate(net(), BATCHES, method=place, progress=False)
    assert found.info["estimator"] == place
    assert found.info["units"].startswith("nats per example; of the loss summed over N = 200")


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("fischer", ValueError, "did you mean 'fisher'"),
        ("no_such_package:X", ValueError, "there is no module 'no_such_package' to import"),
        ("math:X", ValueError, "module 'math' holds no 'X'"),
        ("math:pi.X", ValueError, "module 'math' holds no 'X'"),
        (":X", ValueError, "there is no module '' to import"),
        ("tests.estimators.test_own:HALF", TypeError, "is a SimpleNamespace without finish"),
        ("math:pi", TypeError, "is a float without start and step and finish"),
    ],
)
def test_what_is_no_estimator_is_refused(method, error, message):
    with pytest.raises(error, match=message):
        find_estimator(method)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_ours_conform(name):
    assert check_estimator(ESTIMATORS[name]).trace() > 0


WRONG = [
    (Sums(), AssertionError, "divide the sums by `seen`"),
    (Restless(), AssertionError, "the same seed gave other numbers"),
    (Nothing(), ValueError, "did not deliver the mean blocks"),
    (Other(), ValueError, "a mean block for 'x', which is no"),
    (ODD, ValueError, r"option in GIVES is 'tolerence' \(did you mean 'tolerance'"),
]


@pytest.mark.parametrize(("estimator", "error", "message"), WRONG)
def test_what_does_not_conform_is_told(estimator, error, message):
    with pytest.raises(error, match=message):
        check_estimator(estimator)


def test_own_conforms_and_nothing_is_left_behind():
    before = dict(ESTIMATORS)
    assert isinstance(check_estimator(OWN), Curvature)
    assert before == ESTIMATORS
    parts = {name: getattr(fisher, name) for name in ("start", "step", "finish", "GIVES")}
    assert check_estimator(types.SimpleNamespace(**parts)).trace() > 0
    assert DIAGONAL == "diagonal/"  # documented in protocol.py
