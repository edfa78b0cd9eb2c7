"""The examples of the docstrings run."""

import doctest
import pkgutil
from importlib import import_module

import pytest

from gradmatch import estimators

MODULES = [module.name for module in pkgutil.iter_modules(estimators.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(import_module(f"gradmatch.estimators.{name}")).failed == 0


def test_public_names_have_an_example():
    public = [getattr(estimators, name) for name in estimators.__all__ if name != "ESTIMATORS"]
    assert [each.__name__ for each in public if ">>>" not in (each.__doc__ or "")] == []
