"""Scorers: the proxy, the interface, and what is refused."""

import sys

import numpy as np
import pytest

from experiments.removal import scorers


def half(texts):
    return [0.5] * len(texts)


def outside(texts):
    return [1.5] * len(texts)


def short(texts):
    return [0.1]


@pytest.fixture(autouse=True)
def plugged(monkeypatch):
    """This module under a name that a config could give."""
    monkeypatch.setitem(sys.modules, "own_scorers", sys.modules[__name__])


def test_the_proxy_knows_bad_words_only():
    pytest.importorskip("profanity_check", reason="the extra `removal` is not installed")
    scores = scorers.score("proxy", ["you fucking idiot", "good morning, dear colleagues", ""])
    assert scores[0] > scorers.TOXIC > max(scores[1], scores[2])
    assert (
        scorers.score("proxy", ["I will hurt you tonight"])[0] < scorers.TOXIC
    )  # a threat: it does not see it


def test_any_function_plugs_in_and_refused_continuations_are_nan():
    scores = scorers.score("own_scorers:half", ["a", None, "b"])
    np.testing.assert_array_equal(scores, [0.5, np.nan, 0.5])
    assert np.isnan(scorers.score("own_scorers:half", [None])).all()


@pytest.mark.parametrize("name", ["own_scorers:outside", "own_scorers:short"])
def test_a_scorer_that_breaks_its_contract(name):
    with pytest.raises(ValueError, match=r"one number in \[0, 1\] a text"):
        scorers.score(name, ["a", "b"])


def test_unknown_scorers():
    with pytest.raises(ValueError, match="did you mean 'proxy'"):
        scorers.find("proxi")
    with pytest.raises(ValueError, match="cannot be imported"):
        scorers.find("own_scorers:missing")
    with pytest.raises(ValueError, match="cannot be imported"):
        scorers.find("no_such_module_here:f")


def test_what_scorers_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(ModuleNotFoundError, match=r"gradmatch\[removal\]"):
        scorers.score("proxy", ["a"])
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(ModuleNotFoundError, match="pip install detoxify"):
        scorers.score("detoxify", ["a"])
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    with pytest.raises(ValueError, match="PERSPECTIVE_API_KEY"):
        scorers.score("perspective", ["a"])
