"""What commands say: in flags of their own that exist, once, and with nothing left behind in the process."""

import argparse
import re
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradmatch.cli import COMMANDS, build_parser
from gradmatch.commands.completion import commands
from gradmatch.commands.wording import flags, in_flags
from tests.command import run

ROOT = Path(__file__).parents[2]


def parser_of(command):
    parser = argparse.ArgumentParser(add_help=False)
    import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser


WORDS = [  # command, message in Python's words, in the command's
    ("merge", "or pass allow_mismatch=True if you", "or pass --allow-mismatch if you"),
    ("merge", "pass missing='base' to drop, or heads='keep-per-task'", "pass --missing base to drop, or --heads keep-per-task"),
    ("merge", "(heads='base' or 'keep-per-task' sets", "(--heads base or 'keep-per-task' sets"),
    ("merge", "weights='auto' needs data", "--weights auto needs data"),
    ("merge", "pass base_curvature=... or base_curvature=1.0, or", "pass --base-curvature or --base-curvature 1.0, or"),
    ("merge", "pass Task(model, curvature=...) ", "pass --task MODEL,curvature=FILE "),
    ("merge", "--task 'x,weight=1' is none of curvature=FILE, weight=W", "--task 'x,weight=1' is none of curvature=FILE, weight=W"),
    ("estimate", "name it: text='...'", "name it: --text-column"),
    ("inspect", "pass missing='base'", "pass missing='base'"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "python", "flag"), WORDS)
def test_arguments_come_out_as_flags(command, python, flag):
    assert in_flags(python, flags(parser_of(command))) == flag


def test_with_a_recipe_its_key_is_told_too():
    told = in_flags("pass allow_mismatch=True", flags(parser_of("merge")), "r.yaml")
    assert told == "pass --allow-mismatch (in r.yaml: `allow_mismatch: true`)"


def printed_commands():
    """(file, command, its words) of every `gradmatch COMMAND ...` in messages, help, docstrings and the README."""
    for path in [*ROOT.glob("gradmatch/**/*.py"), *ROOT.glob("estimators/*.py"), ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
        for found in re.finditer(rf"gradmatch ({'|'.join(COMMANDS)})\b([^`\n]*)", text):
            yield path.name, found[1], found[2]


def test_every_printed_command_has_options_that_exist():
    whole = build_parser([], whole=True)
    made = next(a.choices for a in whole._actions if isinstance(a, argparse._SubParsersAction))
    known = {
        command: {o for part in commands(made[command]) for a in part._actions for o in a.option_strings}
        for command in COMMANDS
    }
    seen = 0
    for where, command, words in printed_commands():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", words):
            assert option in known[command] | {"--help", "--debug"}, (where, command, option)
            seen += 1
    assert seen > 40


@pytest.fixture
def models(tmp_path):
    for number, name in enumerate(("base", "one")):
        (tmp_path / name).mkdir()
        tensors = {"w": torch.full((4,), float(number))} | ({} if number else {"b": torch.ones(3)})
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def test_a_commands_remedy_is_its_flag_and_works(models, capsys):
    line = f"merge --base {models}/base --task {models}/one --method task_arithmetic -o {models}/out"
    assert run(line) == 2
    err = capsys.readouterr().err
    assert "--missing base" in err
    assert "missing='base'" not in err
    assert err.count("\n") == 1
    assert run(f"{line} --missing base --quiet") == 0


def test_warnings_are_one_line_and_python_keeps_its_own_way(capsys, monkeypatch):
    shown = warnings.showwarning
    odd = lambda args: warnings.warn("odd", stacklevel=1) or 0  # noqa: E731
    monkeypatch.setattr("gradmatch.commands.inspect.run", odd)
    assert run("inspect x") == 0
    assert capsys.readouterr().err == "gradmatch: warning: odd\n"
    assert warnings.showwarning is shown


BEGINNINGS = [(b'{"a": 1}' * 9, "JSON text"), (b"PK\x03\x04" * 9, "a zip archive"), (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pull|git lfs pull"), (b"GGUF" * 9, "a GGUF file"), (b"<!doctype html>", "a web page"), (b"\x80\x02" * 9, "a pickle"), (b"abc", "give a header of -1 bytes in a file of 3")]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BEGINNINGS)
def test_what_is_taken_for_a_curvature_is_called_what_it_is(tmp_path, capsys, content, message):
    (tmp_path / "c.safetensors").write_bytes(content)
    assert run(f"inspect {tmp_path}/c.safetensors") == 2
    err = capsys.readouterr().err
    assert re.search(f"c.safetensors: not a safetensors file.*({message})", err)
