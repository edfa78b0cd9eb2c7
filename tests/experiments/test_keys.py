"""The key of a stage: its code by import closure, the libraries of that code, and the files that it reads."""

import json
import os
from importlib import metadata

import pytest

from experiments import config as configs
from experiments import keys
from experiments.pipeline import Stage, in_order
from experiments.running import execute

# A package whose stage reaches `used` through a table of lazy names, `inside` through a function, `kernel.c` through its folder.
BAKERY = {
    "__init__.py": """
from importlib import import_module
WHERE = {"Oven": "bakery.used", "Shop": "bakery.unused"}
def __getattr__(name):
    return getattr(import_module(WHERE[name]), name)
""",
    "stages.py": """
from __future__ import annotations
from typing import TYPE_CHECKING
import numpy
from bakery import Oven
from .deep import above
if TYPE_CHECKING:
    from bakery import typed
def bake(out):
    'Bread.'
    from bakery.inside import dough
    return dough(Oven)
""",
    "used.py": "import yaml\nOven = 1\n",
    "inside.py": "def dough(oven):\n    return oven\n",
    "deep/__init__.py": "",
    "deep/above.py": "from .. import used\n",
    "deep/kernel.c": "int one;",
    "typed.py": "Type = int\n",
    "unused.py": "Shop = 1\n",
}
CODE = {"bakery", "bakery.stages", "bakery.used", "bakery.inside", "bakery.deep", "bakery.deep.above"}


@pytest.fixture
def bakery(tmp_path, monkeypatch):
    """The package's folder, whose code is read afresh by `key`."""
    for name, text in BAKERY.items():
        path = tmp_path / "bakery" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (0, 0))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "bakery"


# Not the versions of libraries, which stay as they are.
CACHED = keys._closure, keys._root, keys.locate, keys.read, keys._lazy


def key(function="bakery.stages:bake", **more):
    for cached in CACHED:
        cached.cache_clear()
    return Stage("a", function, **more).key


def test_the_closure_is_what_is_imported_and_no_more(bakery):
    key()
    found = keys.code_of("bakery.stages:bake")
    assert set(found["modules"]) == CODE
    assert set(found["libraries"]) == {"numpy", "yaml"}


@pytest.mark.parametrize(
    "name", ["__init__.py", "stages.py", "used.py", "inside.py", "deep/__init__.py", "deep/above.py"]
)
def test_code_of_the_closure_counts(bakery, name):
    first = key()
    with (bakery / name).open("a") as file:
        file.write("more = 1\n")
    assert key() != first


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stages.py", "'Bread.'", "'Bread of the day.'"),
        ("stages.py", "def bake(out):", "# words\ndef bake(\n    out):"),
        ("stages.py", "from bakery import typed", "from bakery import unused"),
        ("typed.py", "int", "str"),
        ("unused.py", "1", "2"),
    ],
)
def test_comments_docstrings_layout_and_other_code_do_not(bakery, name, old, new):
    first = key()
    text = (bakery / name).read_text()
    assert old in text
    (bakery / name).write_text(text.replace(old, new))
    assert key() == first


def test_c_sources_and_the_files_that_are_read_count(bakery):
    first = key()
    (bakery / "deep" / "kernel.c").write_text("int two;")
    assert key() != first


def test_the_version_of_a_library_of_the_closure_counts(bakery, monkeypatch):
    first, real = key(), metadata.version
    for library, differs in (("numpy", True), ("PyYAML", True), ("torch", False)):
        monkeypatch.setattr(metadata, "version", lambda name, own=library: "0" if name == own else real(name))
        keys.version_of.cache_clear()
        assert (key() != first) is differs, library
    keys.version_of.cache_clear()


def test_a_function_that_the_settings_name_counts(bakery):
    settings = {"scorers": ["bakery.unused:Shop"], "title": "some: text"}
    first = key("bakery.inside:dough", settings=settings)
    (bakery / "unused.py").write_text("Shop = 2\n")
    assert key("bakery.inside:dough", settings=settings) != first
    absent = {"scorer": "no_such_module:f"}  # which the stage itself refuses
    assert key("bakery.inside:dough", settings=absent)


def test_code_that_changes_while_a_run_is_under_way_is_not_run_under_the_old_key(bakery, tmp_path):
    key()
    stage = Stage("bread", "bakery.stages:bake")
    folder = stage.folder(tmp_path)
    os.utime(bakery / "inside.py", (stage.planned + 9, stage.planned + 9))
    with pytest.raises(RuntimeError, match=r"the code of bakery\.inside changed while the run was under way"):
        execute(stage, tmp_path)
    assert not folder.exists()


def test_a_stage_without_code_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="no code found for 'no_such_module'"):
        key("no_such_module:f")


def test_local_files_are_part_of_the_key(tmp_path, bakery):
    def of(*reads):
        return Stage("a", "bakery.inside:dough", reads=reads).key

    file, folder = tmp_path / "a.jsonl", tmp_path / "set"
    assert of() == of("some/hub-name") == of(str(file))  # which is not there yet
    file.write_text("one")
    first = of(str(file))
    assert of(str(file)) == first != of()
    file.write_text("two, longer")
    assert of(str(file)) != first
    file.write_text("one")
    assert of(str(file)) == first
    folder.mkdir()
    found = {of(str(folder))}
    (folder / "x").write_text("x")
    found.add(of(str(folder)))
    (folder / "x").rename(folder / "y")
    found.add(of(str(folder)))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("config", "stage", "modules"),
    [
        ("assumption", "assumption/seed0/refine-0", "gradmatch.merging gradmatch.plan.plan gradmatch.refine"),
        (
            "removal-proof",
            "proof/seed0/ridge",
            "gradmatch.subtraction gradmatch.rules.removal gradmatch.models.task",
        ),
        ("vision", "vision/seed0/evaluate-ta", "experiments.rows experiments.models"),
        ("vision", "vision/seed0/base", "experiments.vision.packages experiments.assets"),
        ("theory", "theory/closer", "gradmatch.estimators.fisher gradmatch.merging experiments.statistics"),
    ],
)
def test_real_stages_reach_what_they_run(config, stage, modules):
    found = configs.load(configs.Path("configs") / f"{config}.yaml")
    stages = in_order(configs.study(found.experiment).stages(found))
    (one,) = (other for other in stages if other.name == stage)
    code = keys.code_of(one.function, one.settings)
    assert set(modules.split()) <= set(code["modules"])
    assert {"torch", "numpy"} <= set(code["libraries"])
    above = "gradmatch.commands", "experiments.studies"
    assert not [name for name in code["modules"] if name.startswith(above)]


def test_a_models_folder_is_part_of_the_keys_that_read_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = configs.load(configs.Path("configs/vision.yaml"), [f"encoder={tmp_path}", "data.pixels=42"])

    def base():
        return next(
            s.key for s in configs.study("vision").stages(config) if s.name == "vision/seed0/evaluate-base"
        )

    first = base()
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert base() != first
