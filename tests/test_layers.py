"""The floors of the house: imports only go down, wings do not import one another, nothing goes in a circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["gradmatch.estimators", "gradmatch", "experiments"]  # each may import those before it
FLOORS = [
    {"common"},
    {"models", "rules"},
    {"plan"},
    {"engine", "output"},
    {"merging", "subtraction"},
    {"measure"},
    {"diagnosis", "choosing", "removal", "refine", "zoo", "mixture", "rebasin", "posterior"},  # the wings
    {"recipes", "api", "testing", "data", "plots", "sharing"},
    {"commands", "cli", "__main__", ""},  # "": gradmatch/__init__.py
]
APART = [FLOORS[3], FLOORS[6]]  # on these floors no part imports another


def modules(folder, package):
    """Module name -> its imports of ours, type-only and function-level ones too."""
    names = {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sorted(folder.rglob("*.py"))
        if "estimators" not in path.relative_to(folder).parts or package != "gradmatch"
    }
    return {name: set(imported(path, names)) for name, path in names.items()}


def imported(path, known):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


TREE = {
    name: modules(ROOT / folder, name)
    for name, folder in (
        ("gradmatch", "gradmatch"), ("gradmatch.estimators", "estimators"), ("experiments", "experiments"),
        ("paper_figures", "paper_figures"),
    )
}  # fmt: skip
EDGES = [(a, b) for tree in TREE.values() for a, targets in tree.items() for b in sorted(targets) if b != a]


def package_of(module):
    known = (p for p in ("gradmatch.estimators", *TREE) if module == p or module.startswith(p + "."))
    return next(known, None)


def floor_of(module):
    part = [*module.split("."), ""][1]
    return next((number for number, floor in enumerate(FLOORS) if part in floor), None)


def test_packages_import_only_those_below():
    for a, b in EDGES:
        own, other = package_of(a), package_of(b)
        if other is None or own == other:
            continue
        if own == "paper_figures":
            assert b.startswith(("experiments.records", "experiments.statistics")), (a, b)
        else:
            assert other in PACKAGES[: PACKAGES.index(own)], (a, b)


def test_imports_of_gradmatch_go_down():
    inside = [(a, b) for a, b in EDGES if package_of(a) == package_of(b) == "gradmatch"]
    for a, b in inside:
        assert floor_of(a) is not None, f"{a} stands on no floor"
        assert floor_of(b) <= floor_of(a), f"{a} imports {b}, which stands higher"
        parts = {[*one.split("."), ""][1] for one in (a, b)}
        assert len(parts) == 1 or not any(parts <= floor for floor in APART), f"{a} imports {b}, beside it"


@pytest.mark.parametrize("package", TREE)
def test_nothing_goes_in_a_circle(package):
    tree = TREE[package]
    graph = {a: {b for b in targets if b in tree and b != a} for a, targets in tree.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


LIGHT = [
    "import gradmatch, gradmatch.estimators",
    "from gradmatch.cli import build_parser; build_parser(['merge'])",
    "from gradmatch.rules import RULES; from gradmatch.rules.edits import TRANSFORMS; from gradmatch import Task",
    "from gradmatch.recipes.recipe import load_recipe; from gradmatch import open_checkpoint",
    "from gradmatch.merging import prepare",
]


@pytest.mark.parametrize("code", LIGHT)
def test_light_parts_import_neither_torch_nor_transformers(code):
    check = f"{code}; import sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_estimators_are_the_same_objects_by_either_name():
    check = "import estimators, gradmatch.estimators as g; print(all(getattr(estimators, n) is getattr(g, n) for n in g.__all__))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_users_own_folder_estimators_does_no_harm(tmp_path):
    (tmp_path / "estimators").mkdir()
    (tmp_path / "estimators" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    check = f"import sys; sys.path.append({str(ROOT)!r}); from gradmatch.estimators import estimate; from gradmatch import merge"
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)


def test_names_that_users_call_come_from_the_top():
    check = (
        "import gradmatch.refine; from gradmatch import Curvature, GradmatchError, estimate, from_adam, refine, __version__;"
        "print(callable(refine), callable(gradmatch.refine.refine), __version__[0], issubclass(GradmatchError, ValueError))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "0", "True"]
