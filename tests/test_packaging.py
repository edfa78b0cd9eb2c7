"""What a release says of itself in several files is the same, and what a wheel holds is gradmatch alone."""

import re
from pathlib import Path

import setuptools
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "([\d.]+)"', PROJECT, re.MULTILINE)[1]


def test_the_version_stands_in_one_place_and_is_cited():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
    code = [*ROOT.glob("gradmatch/**/*.py"), *ROOT.glob("estimators/*.py"), ROOT / "setup.py"]
    assert not [path for path in code if f'"{VERSION}"' in path.read_text(encoding="utf-8")]


def test_the_wheel_holds_gradmatch_alone():
    assert 'packages.find.include = ["gradmatch*"]' in PROJECT
    packages = setuptools.find_namespace_packages(str(ROOT), include=["gradmatch*"])
    assert {name.split(".")[0] for name in packages} == {"gradmatch"}
    assert "gradmatch.estimators" in packages


def test_the_sdist_names_every_tracked_folder():
    told = (ROOT / "MANIFEST.in").read_text()
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    own = folders - {"gradmatch", "build", "dist", "results", "site", "shared", "wandb"}
    assert not [name for name in own if f"graft {name}\n" not in told and not name.endswith(".egg-info")]


def test_every_pin_of_an_extra_is_constrained():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().split()
    }
    extras = PROJECT.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    for name in re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w+\])?[><=]', extras):
        assert name.lower().replace("_", "-") in pinned, name
