"""What every command has: --json, --quiet and --verbose, the schema of recipes, and completion."""

import json

import jsonschema
import pytest
import torch
import yaml

from gradmatch import RULES, Task, forecast, merge
from gradmatch.cli import COMMANDS, build_parser, main
from gradmatch.commands.completion import commands
from gradmatch.estimators import Curvature
from gradmatch.estimators.progress import shown
from gradmatch.recipes.schema import recipe_schema
from tests.command import run
from tests.gradmatch.tiny import save_classifier


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A base and two tasks as files, with curvatures, and a recipe."""
    monkeypatch.chdir(tmp_path)
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        weights = {"up.weight": torch.randn(6, 4, generator=generator), "bias": torch.ones(6)}
        save_file(weights, f"{name}.safetensors")
        means = {key: torch.rand(value.shape, generator=generator) + 0.1 for key, value in weights.items()}
        Curvature.from_dict(means, 10).save(f"{name}-h.safetensors")
    tasks = [{"model": f"{n}.safetensors", "curvature": f"{n}-h.safetensors", "name": n} for n in "ab"]
    content = {"base": "base.safetensors", "base_curvature": "base-h.safetensors", "tasks": tasks}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def told(capsys):
    """The one JSON object on stdout, and what stands on stderr."""
    found = capsys.readouterr()
    return json.loads(found.out, parse_constant=pytest.fail), found.err


BASE = "--base base.safetensors --base-curvature base-h.safetensors"
TASK = "--task a.safetensors,curvature=a-h.safetensors"


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("merge recipe.yaml out --json", {"out", "report"}),
        ("merge recipe.yaml --dry-run --json", {"plan"}),
        (f"subtract {BASE} {TASK} --weight 0.1 -o out --json", {"out", "report"}),
        (f"subtract {BASE} {TASK} --weight 0.1 --dry-run --json", {"plan"}),
        (f"budget {BASE} {TASK} --json", {"path", "largest_alpha", "report"}),
        ("forecast recipe.yaml --json", {"weights", "span", "trusted", "tasks"}),
        ("inspect a.safetensors --json", {"kind", "info", "tensors", "parameters", "bytes"}),
        ("diagnose recipe.yaml --json", {"schema_version", "healthy", "causes", "verdict"}),
        ("schema --json", {"$schema", "properties", "allOf"}),
        ("completion bash --json", {"lines"}),
    ],
)
def test_json_is_one_object_on_stdout(files, capsys, line, keys):
    assert run(line) == 0
    content, _ = told(capsys)
    assert keys <= set(content)


def test_what_went_wrong_is_an_object_too(files, capsys):
    assert run("merge recipe.yaml out --method tis --json") == 2
    content, said = told(capsys)
    assert content["error"]["code"] == "unknown_name"
    assert "ties" in content["error"]["message"] + content["error"]["remedy"]
    assert "did you mean" in said


def test_text_goes_to_stderr_and_nowhere_when_quiet(files, capsys, monkeypatch):
    run("merge recipe.yaml out --json")
    assert "written: out" in told(capsys)[1]
    run("merge recipe.yaml out2 --json --quiet")
    assert told(capsys)[1] == ""
    monkeypatch.setenv("GRADMATCH_VERBOSITY", "quiet")
    assert run("merge recipe.yaml out3") == 0
    found = capsys.readouterr()
    assert "written: out3" in found.out
    assert found.err == ""


@pytest.mark.parametrize(
    ("words", "variable", "said"),
    [
        ("--quiet --verbose", "normal", "--quiet and --verbose do not go together"),
        ("", "loud", "GRADMATCH_VERBOSITY is 'loud'; choose one of quiet, normal, verbose"),
    ],
)
def test_levels_that_are_none(files, capsys, monkeypatch, words, variable, said):
    monkeypatch.setenv("GRADMATCH_VERBOSITY", variable)
    assert run(f"merge recipe.yaml out {words}") == 2
    assert said in capsys.readouterr().err


def test_bars_are_shown_on_a_terminal_unless_all_is_quiet(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert shown(None)
    monkeypatch.setenv("GRADMATCH_VERBOSITY", "quiet")
    assert not shown(None)
    assert shown(True)


def test_every_command_has_them():
    whole = build_parser([], whole=True)
    for parser in commands(whole):
        flags = {flag for action in parser._actions for flag in action.option_strings}
        if parser is not whole and not any(action.nargs == "A..." for action in parser._actions):
            assert {"--json", "--quiet"} <= flags, parser.prog


def test_an_estimate_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_classifier("model")
    (tmp_path / "data.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 4)
    assert run("estimate model --data data.csv -o h.safetensors --json --quiet") == 0
    content, _ = told(capsys)
    assert content["num_examples"] == 8
    assert content["trace"] == pytest.approx(Curvature.load("h.safetensors").trace())


def test_the_schema_takes_what_recipes_hold(files):
    check = jsonschema.Draft202012Validator(recipe_schema())
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    good = yaml.safe_load((files / "recipe.yaml").read_text())
    check.validate(good)
    for method, rule in RULES.items():
        given = {name: value for name, value in rule.options.items() if value is not None}
        check.validate({**good, "method": method, "options": {k: v for k, v in given.items() if k != "seed"}})
    check.validate({**good, "method": "ties", "options": {"density": [0.2, 0.8]}, "transforms": ["dare"]})
    check.validate({**good, "method": "mine.rules:RULE", "options": {"anything": 1}, "tasks": ["a", {"model": "b"}]})  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "tis"},
        {"heads": "none"},
        {"dtype": "int8"},
        {"tsks": []},
        {"tasks": []},
        {"transforms": ["dares"]},
        {"method": "ties", "options": {"densty": 0.2}},
        {"method": "ties", "options": {"density": 2.0}},
        {"method": "slerp", "options": {"along": "row"}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_a_merge_would(files, wrong):
    check = jsonschema.Draft202012Validator(recipe_schema())
    good = yaml.safe_load((files / "recipe.yaml").read_text())
    assert not check.is_valid({**good, **wrong})


def test_the_schema_is_written(files, capsys):
    assert run("schema -o recipe.schema.json") == 0
    assert json.loads((files / "recipe.schema.json").read_text()) == recipe_schema()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "--base-curvature" in script or "base-curvature" in script


def test_tables_and_notebooks(files):
    tasks = [Task(f"{n}.safetensors", f"{n}-h.safetensors", name=n) for n in "ab"]
    merged = merge("base.safetensors", tasks, base_curvature="base-h.safetensors")
    found = forecast("base.safetensors", tasks, base_curvature="base-h.safetensors")
    h = Curvature.load("a-h.safetensors")
    for shown_, columns, rows in (
        (merged.plan, {"name", "kind", "shape", "dtype"}, 2),
        (merged.report, {"name", "norm"}, 2),
        (found, {"task", "weight", "rise", "num_examples"}, 2),
        (h, {"name", "shape", "trace"}, 2),
    ):
        table = shown_.to_frame()
        assert (columns <= set(table.columns), len(table)) == (True, rows)
        page = shown_._repr_html_()
        assert page.startswith("<b>")
        assert len(page) < 5000
    assert h.to_frame()["trace"].sum() == pytest.approx(h.trace())


def test_a_result_is_saved_as_it_is(files):
    tasks = [Task(f"{n}.safetensors", f"{n}-h.safetensors", name=n) for n in "ab"]
    merged = merge("base.safetensors", tasks, base_curvature="base-h.safetensors")
    merged.save("memory")
    written = merge("base.safetensors", tasks, base_curvature="base-h.safetensors", out="written")
    written.save("copy")
    assert written.plan.to_dict()["formula"] == merged.plan.to_dict()["formula"]
    contents = [(files / name / "model.safetensors").read_bytes() for name in ("memory", "written", "copy")]
    assert contents[0] == contents[1] == contents[2]
    with pytest.raises(FileExistsError, match="choose another folder"):
        written.save("copy")
