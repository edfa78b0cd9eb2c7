"""Recipes and the command: what runs, what is printed, and what is said when it cannot."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gradmatch import Task, merge, subtract
from gradmatch.cli import main
from gradmatch.commands.sources import parse_task
from gradmatch.common.settings import Depth, numbers, times, value_at
from gradmatch.common.yamltext import load_yaml
from gradmatch.estimators import Curvature
from gradmatch.recipes.recipe import load_recipe
from tests.command import run
from tests.gradmatch.cases import problem

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """base/, one/, two/ and their curvature files."""
    folder = tmp_path_factory.mktemp("files")
    base, h0, models, curvatures = problem(2, torch.float32)
    for name, model, known in zip(("base", "one", "two"), (base, *models), (h0, *curvatures), strict=True):
        (folder / name).mkdir()
        save_file(model, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
        known.save(folder / f"{name}.safetensors")
    return folder


def recipe(files, **changes):
    tasks = [{"model": name, "curvature": f"{name}.safetensors", "weight": 0.5} for name in ("one", "two")]
    content = {"base": "base", "base_curvature": "base.safetensors", "tasks": tasks, **changes}
    path = files / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def same(folder, wanted):
    """Whether a written model has exactly these values."""
    found = load_file(folder / "model.safetensors")
    return all(torch.equal(found[name], value) for name, value in wanted.items())


def expected(files, **options):
    tasks = [Task(files / name, files / f"{name}.safetensors", 0.5) for name in ("one", "two")]
    return merge(files / "base", tasks, base_curvature=files / "base.safetensors", **options)


def test_recipe_by_command(files, tmp_path, capsys):
    assert run(f"merge {recipe(files)} {tmp_path}/out --quiet") == 0
    printed = capsys.readouterr().out
    assert "gradient_matching: theta0 + sum_t" in printed
    assert f"written: {tmp_path / 'out'}" in printed
    assert same(tmp_path / "out", expected(files))
    run(f"inspect {tmp_path}/out")
    assert "merged by: gradient_matching" in capsys.readouterr().out


def test_flags_alone_and_flags_over_a_recipe(files, tmp_path):
    line = f"merge --base {files}/base --base-curvature {files}/base.safetensors --quiet"
    for name in ("one", "two"):
        line += f" --task {files / name},curvature={files / name}.safetensors,weight=0.5"
    assert run(f"{line} {tmp_path}/a") == 0
    assert run(f"merge {recipe(files, delta0=5.0)} --delta0 1e-6 -o {tmp_path}/b --quiet") == 0
    assert same(tmp_path / "a", load_file(tmp_path / "b" / "model.safetensors"))
    assert run(f"{line} -o {tmp_path}/c --method ties --option density=0.5 --dtype bfloat16") == 0
    assert same(tmp_path / "c", expected(files, method="ties", density=0.5, dtype="bfloat16"))


def test_options_and_transforms_of_a_recipe(files, tmp_path):
    chain = ["dare", {"ties": {"density": 0.5}}]
    path = recipe(files, transforms=chain, options={"density": 0.6}, seed=3)
    assert run(f"merge {path} {tmp_path}/out --quiet") == 0
    assert same(tmp_path / "out", expected(files, transforms=chain, density=0.6, seed=3))
    card = json.loads((tmp_path / "out" / "gradmatch.json").read_text())
    assert [list(edit) for edit in card["recipe"]["transforms"]] == [["dare"], ["ties"]]


def test_dry_run_prints_every_tensor_and_writes_nothing(files, tmp_path, capsys):
    assert run(f"merge {recipe(files)} {tmp_path}/out --dry-run") == 0
    printed = capsys.readouterr().out
    for text in ("\nembed.weight", "\ntemperature", "alpha [0.5, 0.5]", "reads 2.", "enough"):
        assert text in printed
    assert "writes 404 B" in printed or "writes 3" in printed
    assert not list(tmp_path.iterdir())


def test_a_plan_prints_options_once_and_by_tensor_where_they_differ(files, capsys):
    scale = [{"filter": "norm", "value": 0.5}, {"value": 0.9}]
    path = recipe(files, method="task_arithmetic", transforms=["dare"], options={"scale": scale})
    assert run(f"merge {path} --dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    formula = "theta0 + scale * sum_t alpha_t tau_t; tau edited before by dare"
    assert printed[0].startswith(f"method task_arithmetic: {formula}")
    assert len([line for line in printed if "'scale': 0.9" in line]) == 1
    assert [line.split()[0] for line in printed if "'scale': 0.5" in line] == ["norm.bias"]


def test_a_dry_run_and_help_import_no_torch(files):
    code = (
        "import sys; from gradmatch.cli import main\n"
        f"main(['merge', {str(recipe(files))!r}, 'none', '--dry-run'])\n"
        f"main(['inspect', {str(files / 'base')!r}])\n"
        "try: main(['merge', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_subtract_by_command(files, tmp_path, capsys):
    line = f"subtract --base {files}/base --base-curvature {files}/base.safetensors --quiet --weight 0.1"
    line += f" --task {files}/one,curvature={files}/one.safetensors"
    assert run(f"{line} -o {tmp_path}/out --dry-run") == 0
    assert "alpha [0.1]" in capsys.readouterr().out
    assert run(f"{line} -o {tmp_path}/out") == 0
    assert "clamped by the guard" in capsys.readouterr().out
    assert run(f"{line} -o {tmp_path}/two --method negation") == 0


def test_inspect(files, capsys):
    assert run(f"inspect {files}/one") == 0
    assert "embed.weight  F32" in " ".join(capsys.readouterr().out.split("\n")).replace("   ", "  ")
    assert run(f"inspect {files}/one.safetensors --json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["kind"], content["info"]["num_examples"]) == ("curvature", "10")
    assert run(f"inspect {files}/one/model.safetensors") == 0


def test_inspect_shows_each_blocks_error(tmp_path, capsys):
    info = {"relative_errors": json.dumps({"w": 0.123})}
    Curvature.from_dict({"w": torch.ones(2, 3), "b": torch.ones(2)}, 4, info).save(tmp_path / "c.safetensors")
    assert run(f"inspect {tmp_path}/c.safetensors") == 0
    printed = capsys.readouterr().out
    assert "relative_errors" not in printed
    assert re.search(r"mean/w +F32 +\[2, 3\] +\+- 12 %", printed)
    assert printed.endswith("2 tensors, 8 values, 32 B\n")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("gradmatch 0.")


def test_a_fault_of_ours_is_said_to_be_one(monkeypatch, capsys):
    monkeypatch.setattr("gradmatch.commands.merge.run", lambda args: {}["layer_range"])
    assert main(["merge"]) == 2
    assert "KeyError: 'layer_range'" in (said := capsys.readouterr().err)
    assert "a fault of gradmatch; --debug shows where" in said
    with pytest.raises(KeyError):
        main(["merge", "--debug"])


def test_floats_as_yaml_1_2_spells_them(files):
    read = load_yaml("[1e-6, 5e-1, -2E+3, .5e1, 1, 1.5, 1e, e5, no]", "x")
    assert read == [1e-6, 0.5, -2000.0, 5.0, 1, 1.5, "1e", "e5", False]
    assert parse_task("a,weight=1e-1").weight == 0.1
    task = {"model": "one", "curvature": "one.safetensors", "weight": "@"}
    path = recipe(files, base_curvature="@", tasks=[task], method="removal", options={"keep": "@"})
    path.write_text(path.read_text().replace("'@'", "1e-1"))
    arguments = load_recipe(path)
    assert (arguments["base_curvature"], arguments["keep"], arguments["tasks"][0].weight) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("out", "flag", "text"),
    [
        ("out", "", "pass overwrite"),
        ("out", "--overwrite", "holds files but no gradmatch.json"),
        ("models/one", "--overwrite", "lie in one another"),
    ],
)
def test_a_dry_run_says_that_the_output_would_be_refused(files, tmp_path, capsys, out, flag, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    (tmp_path / "models").symlink_to(files)
    assert run(f"merge {recipe(files)} {tmp_path / out} --dry-run {flag}") == 2
    assert text in capsys.readouterr().err


def test_a_card_is_json_also_where_a_number_has_no_limit(files, tmp_path):
    flat = Curvature.from_dict(
        {name: torch.zeros(t.shape) for name, t in load_file(files / "one" / "model.safetensors").items()}, 3
    )
    for weight in (0.0, 1.0):
        out = tmp_path / str(weight)
        done = subtract(files / "base", Task(files / "one", flat), base_curvature=1.0, weight=weight, out=out)
        assert set(done.report.largest_alpha.values()) == {math.inf}
        content = json.loads((out / "gradmatch.json").read_text(), parse_constant=pytest.fail)
        assert set(content["report"]["largest_alpha"].values()) == {None}


@pytest.mark.parametrize("line", ["--debug merge absent.yaml out", "merge absent.yaml out --debug"])
def test_debug_shows_the_traceback(line):
    with pytest.raises(FileNotFoundError):
        run(line)


def test_a_task_may_be_a_path_alone_and_its_weight_is_checked_by_the_plan(files):
    assert load_recipe(recipe(files, tasks=["one", {"model": "two"}]))["tasks"][0].model == str(files / "one")
    wrong = load_recipe(recipe(files, tasks=[{"model": "one", "weight": "half"}], method="task_arithmetic"))
    with pytest.raises(TypeError, match="the weight of one is 'half'; it must be a number"):
        merge(**wrong)


def test_tasks_on_the_command_line():
    task = parse_task("a,weight=[0.1,0.9],name=x,curvature=c")
    assert (task.model, task.weight, task.name, task.curvature) == ("a", [0.1, 0.9], "x", "c")
    assert parse_task("a,weight={'*mlp*': [0, 1], '*': 0.5},name=x").weight == {"*mlp*": [0, 1], "*": 0.5}


@pytest.mark.parametrize(
    ("setting", "name", "depth", "value"),
    [
        (0.5, "x", 0.0, 0.5),
        (True, "x", 0.0, True),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 1, 0], "x", 0.75, 0.5),
        ([0.3], "x", 0.9, 0.3),
        ({"*mlp*": 0.7, "*": [0, 1]}, "a.mlp.b", 0.5, 0.7),
        ({"*mlp*": 0.7, "*": [0, 1]}, "a.attn.b", 0.5, 0.5),
        ([{"filter": "mlp", "value": [1, 3]}, {"value": 0.3}], "a.mlp.b", 0.5, 2.0),
        ([{"filter": "mlp", "value": 0.7}, {"value": 0.3}], "a.attn.b", 0.5, 0.3),
        ([{"layer": 3, "value": 9}, {"value": 1}], "layers.3.w", 0.0, 9.0),
    ],
)
def test_settings(setting, name, depth, value):
    assert value_at(setting, name, depth) == pytest.approx(value)


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["0.weight", "2.weight", "4.weight"], [0, 0.5, 1]),
        (["conv1.weight", "layer1.0.conv1.weight", "layer3.1.conv2.weight", "layer4.0.bn1.weight", "fc.weight"], [0, 0, 2 / 3, 1, 1]),
        (["w", "v"], [None, None]),
        (["embed.w", "layers.0.w", "layers.1.w", "layers.4.w", "norm.w"], [0, 0, 0.25, 1, 1]),
    ],
)  # fmt: skip
def test_depth_of_other_names(names, depths):
    depth = Depth(names)
    assert [depth.of(name) for name in names] == pytest.approx(depths)


def test_settings_helpers():
    assert numbers([{"filter": "a", "value": [1, 2]}, {"value": 3}]) == [1, 2, 3]
    assert times({"a": [1, 2], "b": 3}, 2.0) == {"a": [2, 4], "b": 6}
    assert times([{"filter": "x", "value": 1}], -1) == [{"filter": "x", "value": -1}]
