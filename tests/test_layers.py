"""The four floors: imports only go down, and what needs no torch does not wait for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["estimators", "gradmatch", "experiments"]  # each may import those before it
RECORDS = "experiments.records"  # the only thing of ours that figures read with
SOURCES = [path for package in (*FLOORS, "paper_figures") for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT).parts[0]
    for module in imported(path):
        floor = module.split(".")[0]
        if own == "paper_figures":
            assert floor not in FLOORS or module.startswith(RECORDS), module
        elif floor in (*FLOORS, "paper_figures"):
            assert floor in FLOORS[: FLOORS.index(own) + 1], module


LIGHT = [
    "import gradmatch, estimators",
    "from gradmatch.cli import build_parser; build_parser(['merge'])",
    "from gradmatch.rules import RULES; from gradmatch.transforms import TRANSFORMS; from gradmatch import Task",
    "from gradmatch.recipe import load_recipe; from gradmatch.checkpoint import open_checkpoint",
    "from gradmatch.merging import prepare",
]


@pytest.mark.parametrize("code", LIGHT)
def test_light_parts_import_neither_torch_nor_transformers(code):
    check = f"{code}; import sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
